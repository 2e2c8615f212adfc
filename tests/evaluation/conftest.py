"""A tiny model that can be asked and can draw, with its processor."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTProcessor, build_word_tokenizer
from ett.scenes_ett import WORDS, vocabulary


@pytest.fixture(scope="session")
def tokenizer():
    torch.manual_seed(0)
    return IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=16,
        vq_embed_dim=8,
        norm_num_groups=4,
        mid_block_add_attention=False,
        patch_size=2,
        l2_normalize=True,
    ).eval()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return ETTProcessor.from_parts(build_word_tokenizer(vocabulary(), WORDS), tokenizer, image_size=72)


@pytest.fixture(scope="session")
def model(tokenizer, processor):
    torch.manual_seed(0)
    language_model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            vocab_size=len(processor.tokenizer),
        )
    )
    return ETTForConditionalGeneration.from_parts(
        language_model,
        tokenizer,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_size=72,
        visual_head=True,
    ).eval()
