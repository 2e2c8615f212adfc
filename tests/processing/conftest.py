"""A tiny processor, with a vision tokenizer whose codes can be worked out by hand."""

import pytest
import torch
from PIL import Image

from processing_ett import ETTProcessor, build_word_tokenizer

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
def picture():
    """Left third black, the rest white: with the processor's size, two rows of codes 0, 3, 3."""
    picture = Image.new("RGB", (24, 16), "white")
    picture.paste("black", (0, 0, 8, 16))
    return picture
