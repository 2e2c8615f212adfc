"""Tiny models as `ett demo` would leave them: a tokenizer, a chat model and a drawing model, with random weights."""

import pytest
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTProcessor, build_word_tokenizer

WORDS = ["a", "red", "circle", "blue", "square", "what", "color", "is", "the", "?"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with `ett-tokenizer`, `ett-chat` and `ett-gen`, for images of 16 x 16 pixels and 4 x 4 codes."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vision_tokenizer = IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
        vq_embed_dim=8,
        norm_num_groups=4,
    )
    vision_tokenizer.save_pretrained(folder / "ett-tokenizer")
    for name in ("ett-chat", "ett-gen"):
        tokenizer = build_word_tokenizer(WORDS)
        processor = ETTProcessor.from_parts(tokenizer, vision_tokenizer.spatial_factor, image_size=16)
        language_model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        )
        model = ETTForConditionalGeneration.from_parts(
            language_model,
            vision_tokenizer,
            image_token_id=processor.image_token_id,
            image_start_token_id=processor.image_start_token_id,
            image_end_token_id=processor.image_end_token_id,
            image_size=16,
            visual_head=name == "ett-gen",
        )
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    processor.image_processor.save_pretrained(folder / "ett-tokenizer")
    return folder


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    return path
