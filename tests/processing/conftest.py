"""A tiny processor, with a vision tokenizer whose codes can be worked out by hand, and tiny models on disk."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM

import ett
from ett.processing_ett import ETTProcessor, build_word_tokenizer

VOCABULARY = ["a red circle, at the top.", "a blue square", "what color is it?"]


class MeanTokenizer:
    """Code 0 to 3 by the mean of a block of 8 x 8 pixels; the embedding of code k is (k, -k)."""

    spatial_factor = 8
    dtype = torch.float32
    device = torch.device("cpu")

    def encode_codes(self, pixels):
        means = torch.nn.functional.avg_pool2d(pixels.mean(1), 8)
        return ((means + 1) * 2).long().clamp(0, 3)

    def codes_to_embeddings(self, codes):
        return torch.stack([codes, -codes], dim=1).float()


@pytest.fixture
def tokenizer():
    return build_word_tokenizer(VOCABULARY)


@pytest.fixture
def processor(tokenizer):
    return ETTProcessor.from_parts(tokenizer, MeanTokenizer(), image_size=(16, 24))


@pytest.fixture
def image():
    """Left third black, the rest white: with the processor's size, two rows of codes 0, 3, 3."""
    image = Image.new("RGB", (24, 16), "white")
    image.paste("black", (0, 0, 8, 16))
    return image


@pytest.fixture(scope="session")
def save_model(tmp_path_factory):
    """Saves a tiny ETT model with random weights, as training leaves it, with two images beside it."""

    def save(name: str, visual_head: bool = False) -> Path:
        torch.manual_seed(0)
        vision_tokenizer = ett.IBQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=8,
            num_vq_embeddings=32,
            vq_embed_dim=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
        tokenizer = build_word_tokenizer(["a red circle, at the top.", "what color is it?"])
        processor = ETTProcessor.from_parts(tokenizer, vision_tokenizer, image_size=8)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        model = ett.ETTForConditionalGeneration.from_parts(
            Qwen2ForCausalLM(config),
            vision_tokenizer,
            image_token_id=processor.image_token_id,
            image_start_token_id=processor.image_start_token_id,
            image_end_token_id=processor.image_end_token_id,
            image_size=8,
            visual_head=visual_head,
        )
        folder = tmp_path_factory.mktemp("model") / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        Image.new("RGB", (10, 8), "red").save(folder / "red.png")
        Image.new("RGB", (8, 12), "blue").save(folder / "blue.png")
        return folder

    return save
