"""Settings and tiny fixtures shared by every test: nothing is downloaded, and one thread is enough."""

import os

# Read by the libraries when they are first imported, hence here and not in a fixture.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `make test` runs a process on each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# The same few examples in every run, and no file of them.
settings.register_profile(
    "tests",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    # What fixtures make is the same for every example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tests")

# Tokens of the tiny models' vocabulary of 40; words are 10 and above.
PAD, IMAGE, IMAGE_START, IMAGE_END = 0, 4, 5, 6


@pytest.fixture
def free_port() -> int:
    """A port on which processes of a test may meet."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def make_vision_tokenizer():
    """Makes an [`IBQModel`] of 32 codes of width 8, 4 pixels a code; fields can be changed by name."""
    import torch

    from ett.modeling_ett.modeling_ibq import IBQModel

    def make(seed: int = 0, **changes):
        torch.manual_seed(seed)
        fields = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "latent_channels": 8,
            "num_vq_embeddings": 32,
            "vq_embed_dim": 8,
            "norm_num_groups": 4,
            "patch_size": 2,
        }
        return IBQModel(**{**fields, **changes})

    return make


@pytest.fixture
def make_language_model():
    """Makes a causal language model of width 32 and 2 layers; `name` is that of its family, e.g. `Qwen2`."""
    import torch
    import transformers

    def make(name: str = "Qwen2", seed: int = 0, **changes):
        torch.manual_seed(seed)
        fields = {
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            # Large enough that outputs depend visibly on inputs without any training.
            "initializer_range": 0.3,
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        config = getattr(transformers, f"{name}Config")(**{**fields, **changes})
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture
def make_model(make_language_model, make_vision_tokenizer):
    """Makes an ETT model of the two for images of 16 x 16 pixels, in evaluation mode."""
    import torch

    from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration

    def make(language_model=None, vision_tokenizer=None, **config):
        language_model = language_model or make_language_model()
        vision_tokenizer = vision_tokenizer or make_vision_tokenizer()
        torch.manual_seed(0)
        fields = {
            "image_token_id": IMAGE,
            "image_start_token_id": IMAGE_START,
            "image_end_token_id": IMAGE_END,
            "image_size": 16,
            "visual_head": True,
        }
        return ETTForConditionalGeneration.from_parts(language_model, vision_tokenizer, **{**fields, **config}).eval()

    return make
