"""What a recipe's data look like to the model: a batch as one page of HTML."""

import base64
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from ett.common_ett.files import replacing
from ett.data_ett import IGNORED, PreparedDataset, PreparedStream
from ett.data_ett.collator import pack
from ett.processing_ett import ETTImageProcessor, ETTProcessor

from ..consistency import check_recipe
from ..examples import build_examples, describe_data
from ..models.building import build_processor, set_fit
from ..recipes import Recipe, load_recipe
from ..run import build_collator, prepare_examples

CODE_SIDE = 8
"""Pixels a code along each side of a mosaic."""

SKIPPED_SHOWN = 20


@dataclass
class Piece:
    """Neighbouring tokens of one kind.

    Args:
        kind: `text`, `special` or `image`.
        text: What the tokens say; of an image, its placeholder and how many there are.
        branch: 0 for what all turns share, else the turn's number (`data.independent_turns`).
    """

    kind: str
    text: str
    is_predicted: bool
    branch: int = 0


@dataclass
class Shown:
    """An example as the page shows it: its images as data URLs, its tokens, how many of them are predicted, and the
    number of its row where examples share rows of the batch (`data.packing`)."""

    name: str
    images: list[str]
    pieces: list[Piece]
    length: int
    predicted: int
    is_codes: bool
    row: int | None = None


def inspect_data(
    name: str, overrides: list[str] | None = None, output: str | Path = "inspection.html", count: int = 8
) -> Path:
    """Writes a page that shows a batch of a recipe's data. Loads the text tokenizer, and no weights.

    Args:
        name, overrides: As [`load_recipe`] takes them.
        output: HTML file to write; it holds all that it shows.
        count: Examples in the batch: of a stream the first, else drawn by the recipe's seed from all of them.

    Raises:
        ValueError: The recipe or its data cannot be used.
    """
    output = Path(output)
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder '{output.parent}' to write '{output.name}' into.")
    recipe = load_recipe(name, overrides)
    check_recipe(recipe)
    seed = recipe.training.get("seed", 0)
    examples = build_examples(recipe, seed)
    processor = build_processor(recipe, examples)
    set_fit(recipe, processor)
    items, skipped, filters = take(prepare_examples(recipe, examples, processor, seed), count, seed)
    page = render(recipe, items, build_collator(recipe, processor)(items), processor, skipped, filters)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return output


def take(
    prepared: PreparedDataset | PreparedStream, count: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, str], list[dict[str, Any]]]:
    """Prepared examples, a stream's first ones or some of all; what was skipped on the way to them, and why; and what
    filters removed."""
    examples = prepared.examples
    if isinstance(prepared, PreparedStream):
        items = list(itertools.islice(prepared, count))
        positions = [item.pop("position") for item in items]
        skipped = {name: reason for item in items for name, reason in item.pop("skipped").items()}
        return items, skipped, examples.filters_report(positions[-1:])
    chosen = np.random.default_rng(seed).permutation(len(prepared))[:count]
    items = [prepared[int(index)] for index in sorted(chosen)]
    return items, prepared.skipped, examples.filters_report()


def render(
    recipe: Recipe,
    items: list[dict[str, Any]],
    batch: dict[str, Any],
    processor: ETTProcessor | ETTImageProcessor,
    skipped: dict[str, str],
    filters: list[dict[str, Any]],
) -> str:
    """The page of prepared examples, of the batch that the collator made of them, and of what did not come so far."""
    shown = [show(item, processor, recipe.learns.predicts_codes) for item in items]
    if recipe.data.packing and "input_ids" in batch:
        for number, row in enumerate(pack([one.length for one in shown], recipe.data.max_length), 1):
            for index in row:
                shown[index].row = number
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    return environment.get_template("inspection.html").render(
        recipe=recipe,
        source=describe_data(recipe.data),
        examples=shown,
        summary=summarize_batch(shown, batch),
        tensors=[describe_tensor(*entry) for entry in batch.items() if isinstance(entry[1], torch.Tensor)],
        filters=filters,
        skipped=list(skipped.items())[:SKIPPED_SHOWN],
        num_skipped=len(skipped),
    )


def show(item: dict[str, Any], processor: ETTProcessor | ETTImageProcessor, predicts_codes: bool = False) -> Shown:
    """A prepared example as the page shows it; of a drawing, the codes are what is predicted."""
    pieces, predicted = [], 0
    if "input_ids" in item:
        labels = item["labels"]
        if predicts_codes:
            labels = [token if token == processor.image_token_id else IGNORED for token in item["input_ids"]]
        pieces = list(split_pieces(item["input_ids"], labels, item.get("branches"), processor))
        predicted = sum(label != IGNORED for label in labels)
    codes = item.get("image_codes")
    images = [mosaic(one) for one in codes] if codes is not None else []
    images += [_to_image(pixels) for pixels in item.get("pixel_values", [])]
    return Shown(
        name=item.get("name", ""),
        images=[data_url(image) for image in images],
        pieces=pieces,
        length=len(item.get("input_ids", [])),
        predicted=predicted,
        is_codes=codes is not None,
    )


def split_pieces(
    input_ids: list[int], labels: list[int], branches: list[int] | None, processor: ETTProcessor
) -> Iterator[Piece]:
    """Tokens as runs of one kind, predicted or not, of one branch."""
    special = set(processor.tokenizer.all_special_ids)

    def key(token: tuple[int, int, int]) -> tuple[str, bool, int]:
        number, label, branch = token
        kind = "image" if number == processor.image_token_id else "special" if number in special else "text"
        return kind, label != IGNORED, branch

    tokens = zip(input_ids, labels, branches or [0] * len(input_ids), strict=True)
    for (kind, is_predicted, branch), run in itertools.groupby(tokens, key):
        ids = [number for number, _, _ in run]
        text = f"{processor.image_token} x {len(ids)}" if kind == "image" else processor.tokenizer.decode(ids)
        yield Piece(kind, text, is_predicted, branch)


def summarize_batch(shown: list[Shown], batch: dict[str, Any]) -> dict[str, Any]:
    """`examples`, and where there are tokens, their number (`tokens`), the `longest` example, and shares of `padding`
    and of `predicted` tokens."""
    summary: dict[str, Any] = {"examples": len(shown)}
    if "input_ids" in batch:
        tokens = sum(one.length for one in shown)
        summary |= {
            "tokens": tokens,
            "longest": max(one.length for one in shown),
            "padding": 1 - tokens / batch["input_ids"].numel(),
            "predicted": sum(one.predicted for one in shown) / tokens,
        }
    return summary


def describe_tensor(name: str, tensor: torch.Tensor) -> dict[str, str]:
    """Name, shape, type and range of one of the batch's tensors."""
    shape = " x ".join(map(str, tensor.shape))
    values = f"{tensor.min().item():g} to {tensor.max().item():g}"
    return {"name": name, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch."), "values": values}


def mosaic(codes: torch.LongTensor) -> Image.Image:
    """Codes `(h, w)` as squares, of one colour where they are the same; what they show only a tokenizer knows."""
    # Multiples of the golden ratio lie far apart from one another, whichever codes are neighbours.
    hues = (codes.numpy().astype(np.float64) * 0.6180339887498949 % 1 * 255).astype(np.uint8)
    flat = np.full_like(hues, 170)
    image = Image.merge("HSV", [Image.fromarray(plane) for plane in (hues, flat, flat + 50)])
    return image.convert("RGB").resize(
        (CODE_SIDE * codes.shape[1], CODE_SIDE * codes.shape[0]), Image.Resampling.NEAREST
    )


def data_url(image: Image.Image) -> str:
    """An image as a URL that holds it."""
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


__all__ = ["inspect_data"]
