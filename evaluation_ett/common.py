"""What the measurements share: batches, images as tensors and back, prompts, a model in evaluation mode, files."""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn
from transformers import BatchEncoding

from ett.common_ett.files import write_text
from ett.common_ett.images import image_to_pixels
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.processing_ett import ETTProcessor
from ett.scenes_ett import Scene

Item = TypeVar("Item")


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`; the last may be shorter. Raises `ValueError` for a size below 1."""
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1.")
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the module is in the mode that it was in."""
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(was_training)


def to_pixels(image: Scene | Image.Image | torch.Tensor) -> torch.Tensor:
    """An image as float32 `(3, H, W)` in `[-1, 1]`; a tensor is expected to be that already.

    Raises:
        ValueError: A tensor is not of three channels.
    """
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"An image has shape {tuple(image.shape)}; expected (3, H, W) with values in [-1, 1].")
        return image.float()
    return image_to_pixels(image.render() if isinstance(image, Scene) else image)


def encode(
    model: ETTForConditionalGeneration, processor: ETTProcessor, images: list[Image.Image], batch_size: int
) -> torch.LongTensor:
    """The codes `(N, h, w)` that the model's own tokenizer gives to N images: made once, read by many prompts."""
    codes = []
    with evaluating(model):
        for batch in batches(images, batch_size):
            pixels = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
            codes.append(model.model.quantize_pixels(pixels.to(model.device)).codes)
    return torch.cat(codes)


def image_prompt(processor: ETTProcessor, text: str) -> str:
    """A user's turn that asks `text` of one image, up to the answer, with a placeholder for each code.

    The empty text gives the image alone, which captions follow in training's stages 1 and 2.
    """
    if not text:
        return processor.image_placeholder()
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt.replace(processor.image_token, processor.image_placeholder())


def tokenize(processor: ETTProcessor, prompts: list[str]) -> BatchEncoding:
    """Prompts that hold a placeholder for each code, padded on the left; the processor would ask for images."""
    return processor.encode_texts(prompts)


def answer(
    model: ETTForConditionalGeneration,
    processor: ETTProcessor,
    prompts: list[str],
    image_codes: torch.LongTensor,
    max_new_tokens: int,
) -> list[str]:
    """What the model answers, greedily, to prompts with one image each, of codes `(len(prompts), h, w)`."""
    inputs = tokenize(processor, prompts).to(model.device)
    tokens = model.generate(
        **inputs,
        image_codes=image_codes,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    texts = processor.post_process_image_text_to_text(tokens[:, inputs["input_ids"].shape[1] :])
    return [text.strip() for text in texts]


def write_json(path: Path, value: Any) -> Path:
    """Writes plain values, see [`write_text`], without images and with null for numbers that are not finite."""
    return write_text(path, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not isinstance(item, Image.Image)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = [
    "answer",
    "batches",
    "encode",
    "evaluating",
    "image_prompt",
    "to_pixels",
    "tokenize",
    "write_json",
]
