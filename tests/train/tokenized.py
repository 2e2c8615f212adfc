"""Pictures for the tests that turn them into codes, and the codes' data sets."""

import datasets
import torch
from PIL import Image

from ett.data_ett.tokenization import tokenize_data_set
from ett.processing_ett import ETTImageProcessor

NUM_PICTURES = 6


def picture(number):
    generator = torch.Generator().manual_seed(number)
    levels = torch.randint(0, 256, (20, 16 + number, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def tokenize(pictures, output, tokenizer, size=16, **options):
    image_processor = ETTImageProcessor(size={"height": size, "width": size})
    options = {"model": "some/tokenizer", "batch_size": 2, "progress": False, **options}
    return tokenize_data_set(str(pictures), output, tokenizer, image_processor, **options)


def rows(folder):
    return datasets.load_dataset(str(folder), split="train")
