"""A captioning engine, such as the paper's data went through (section 4.1): any image-text-to-text model of
transformers describes the images of a dataset anew."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from ett.processing_ett import CAPTION_PROMPT, ImageError

from .image_rows import LIST_TYPES, image_cells, image_name, load_rows, open_images
from .shards import Part, ShardsReport, Skipped, write_shards

RECORD_NAME = "recaptioning.json"


class Captioner:
    """A model that describes images when asked to, and its processor.

    Args:
        model (`str`): Folder or Hub name of an image-text-to-text model with a chat template.
        prompt (`str`): What it is asked, after the images.
        max_new_tokens (`int`): Longest caption.
        temperature (`float`): 0 takes the likeliest token each time; above, tokens are sampled.
        dtype (`str`): Of its weights: `auto`, as they are stored, or a name such as `bfloat16`.
        device (`str`, *optional*): By default the accelerator where there is one.

    Raises:
        ValueError: The model is missing or damaged, is of another kind, or has no chat template.
    """

    def __init__(
        self,
        model: str,
        prompt: str = CAPTION_PROMPT,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        dtype: str = "auto",
        device: str | None = None,
    ):
        self.prompt = prompt
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.options["temperature"] = temperature
        device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            if getattr(self.processor, "chat_template", None) is None:
                raise ValueError(
                    "its processor has no chat template; choose a model that was tuned to follow instructions"
                )
            self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"'{model}' cannot describe images: {error}") from error
        self.processor.tokenizer.padding_side = "left"
        # Pixels rounded to half precision would have other codes in an ETT model.
        self.input_dtype = torch.float32 if self.model.config.model_type == "ett" else self.model.dtype

    @torch.inference_mode()
    def describe(self, rows: list[list[Image.Image]]) -> list[str]:
        """One caption for each row's images."""
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": image} for image in images),
                        {"type": "text", "text": self.prompt},
                    ],
                }
            ]
            for images in rows
        ]
        inputs = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.input_dtype)
        tokens = self.model.generate(**inputs, **self.options)
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


class Recaptioning:
    """The rows of a dataset with new captions, batch by batch.

    Args:
        rows (`datasets.Dataset`): Images undecoded, as of [`load_rows`].
        captioner ([`Captioner`]).
        seed, batch_size (`int`): A sampled caption depends on them and on the row's number alone.
        image_column, text_column (`str`): Where images are, and where captions go; what was there stands in
            `original_` and that name.

    Attributes:
        features (`datasets.Features`): Columns of the new rows.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        captioner: Captioner,
        seed: int = 0,
        batch_size: int = 8,
        image_column: str = "image",
        text_column: str = "text",
    ):
        self.rows, self.captioner, self.seed, self.batch_size = rows, captioner, seed, batch_size
        self.image_column, self.text_column = image_column, text_column
        columns = dict(rows.features)
        if text_column in columns:
            columns[f"original_{text_column}"] = columns[text_column]
        several = isinstance(columns[image_column], LIST_TYPES)
        columns[image_column] = datasets.List(datasets.Image()) if several else datasets.Image()
        columns[text_column] = datasets.Value("string")
        self.features = datasets.Features(columns)

    def make_rows(self, numbers: range) -> Iterator[dict[str, Any] | Skipped]:
        """The new row of each number, or the reason why there is none."""
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            cells = self.rows[batch]
            rows = [dict(zip(cells, values, strict=True)) for values in zip(*cells.values(), strict=True)]
            yield from self._describe(batch, rows)

    def _describe(self, numbers: range, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any] | Skipped]:
        names = [image_name(row[self.image_column], number) for number, row in zip(numbers, rows, strict=True)]
        opened = [self._open(row[self.image_column], name) for row, name in zip(rows, names, strict=True)]
        readable = [images for images in opened if not isinstance(images, Skipped)]
        set_seed(self.seed + numbers.start)
        captions = iter(self.captioner.describe(readable) if readable else [])
        for row, name, images in zip(rows, names, opened, strict=True):
            if isinstance(images, Skipped):
                yield images
            elif caption := next(captions):
                row = {**row, self.image_column: _with_contents(row[self.image_column], images)}
                former = {f"original_{self.text_column}": row[self.text_column]} if self.text_column in row else {}
                yield {**row, **former, self.text_column: caption}
            else:
                yield Skipped(name, "The model wrote nothing.")

    @staticmethod
    def _open(cell: Any, name: str) -> list[Image.Image] | Skipped:
        try:
            return open_images(cell) or Skipped(name, "It has no image.")
        except ImageError as error:
            return Skipped(name, str(error))


def _with_contents(cell: Any, images: list[Image.Image]) -> Any:
    """An image cell that can be stored without what it names: images that are no local files, such as URLs, are
    replaced by their content as PNG."""
    kept = []
    for stored, image in zip(image_cells(cell), images, strict=True):
        path = stored.get("path") if isinstance(stored, dict) and not stored.get("bytes") else None
        if path and not Path(path).is_file():
            with io.BytesIO() as file:
                image.save(file, "PNG")
                stored = {"bytes": file.getvalue(), "path": None}
        kept.append(stored)
    return kept if isinstance(cell, list) else kept[0]


def recaption(
    path: str,
    output: str | Path,
    model: str,
    prompt: str = CAPTION_PROMPT,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    split: str | None = None,
    image_column: str = "image",
    text_column: str = "text",
    rows_per_shard: int = 10_000,
    part: Part | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool = True,
) -> ShardsReport:
    """Writes a dataset with its images described anew, to learn from. Goes on where it was interrupted.

    Args:
        path: Dataset, as [`load_rows`] takes it.
        output: Folder to write.
        model, prompt, max_new_tokens, temperature, dtype, device: As of [`Captioner`].
        seed, batch_size, image_column, text_column: As of [`Recaptioning`].
        rows_per_shard, part: As of [`write_shards`].

    Raises:
        ValueError: The dataset, the model or the folder cannot be used.
    """
    rows = load_rows(path, split, image_column, (image_column,), "--image-column")
    if f"original_{text_column}" in rows.column_names:
        raise ValueError(
            f"'{path}' has a column 'original_{text_column}', so its captions are new already; describe the dataset "
            "that it was made of."
        )
    captioner = Captioner(model, prompt, max_new_tokens, temperature, dtype, device)
    work = Recaptioning(rows, captioner, seed, batch_size, image_column, text_column)
    settings = {
        "data_set": path,
        "split": str(rows.split),
        "image_column": image_column,
        "text_column": text_column,
        "model": model,
        "dtype": str(captioner.model.dtype),
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
    }
    return write_shards(
        output, len(rows), work.make_rows, work.features, RECORD_NAME, settings, rows_per_shard, part, progress
    )


__all__ = ["RECORD_NAME", "Captioner", "Recaptioning", "recaption"]
