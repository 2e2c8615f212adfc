"""Images for the tests that turn them into codes, and the codes' datasets."""

import datasets
import torch
from PIL import Image

from ett.data_ett.tokenization import tokenize_data_set
from ett.processing_ett import ETTImageProcessor

NUM_IMAGES = 6


def image(number):
    generator = torch.Generator().manual_seed(number)
    levels = torch.randint(0, 256, (20, 16 + number, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def tokenize(images, output, tokenizer, size=16, **options):
    image_processor = ETTImageProcessor(size={"height": size, "width": size})
    options = {"model": "some/tokenizer", "batch_size": 2, "progress": False, **options}
    return tokenize_data_set(str(images), output, tokenizer, image_processor, **options)


def rows(folder):
    return datasets.load_dataset(str(folder), split="train")
