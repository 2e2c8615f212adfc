"""Datasets of image codes, which `ett tokenize` makes of images: a frozen tokenizer gives the same codes for ever.

The column `image_codes` is a list of the row's images, each a list of rows of codes. The folder's `tokenization.json`
says which tokenizer made them.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from .shards import read_record

TOKENIZATION_NAME = "tokenization.json"
FORMAT = 2
"""Number of the layout, which the record holds; the first one had codes as packed bits."""

CODES_FEATURES = datasets.Features(
    {"image_codes": datasets.List(datasets.List(datasets.List(datasets.Value("int32"))))}
)


def is_tokenized(path: str | Path) -> bool:
    """Whether this is a folder that `ett tokenize` wrote, or is about to."""
    return (Path(path) / TOKENIZATION_NAME).is_file()


def read_tokenization(path: str | Path) -> dict[str, Any]:
    """What made a folder's codes: `fingerprint`, `num_codes`, `model`, `preprocessing` and other settings.

    Raises:
        ValueError: Its `tokenization.json` is damaged, or its codes have another layout.
    """
    record = read_record(path, TOKENIZATION_NAME)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"'{path}' holds codes in the layout of another version; make them again with `ett tokenize`."
        )
    return record


def fit_of_codes(record: dict[str, Any]) -> str:
    """How images were fitted before they became codes: `fit` of the image processor, by a folder's record."""
    crop = record["preprocessing"]["crop"]
    return "crop" if crop == "centre" else crop


def codes_to_row(codes: torch.LongTensor | None) -> dict[str, Any]:
    """The column of a row's images, of which there may be none: `codes` is `(num_images, h, w)`."""
    return {"image_codes": [] if codes is None else codes.tolist()}


def row_to_codes(row: dict[str, Any], num_codes: int) -> torch.LongTensor:
    """The codes `(num_images, h, w)` of a row's images.

    Raises:
        ValueError: They are no grid, or a code is out of range.
    """
    if not row["image_codes"]:
        return torch.zeros(0, 0, 0, dtype=torch.long)
    try:
        codes = torch.from_numpy(np.array(row["image_codes"], dtype=np.int64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Its 'image_codes' are no grid of codes ({error}). The data are damaged.") from error
    if codes.ndim != 3 or not 0 <= codes.min() <= codes.max() < num_codes:
        raise ValueError(
            f"Its 'image_codes' have shape {tuple(codes.shape)} and lie between {codes.min()} and {codes.max()}; "
            f"expected images, rows and columns, and 0 to {num_codes - 1}. The data are damaged."
        )
    return codes


__all__ = [
    "CODES_FEATURES",
    "FORMAT",
    "TOKENIZATION_NAME",
    "codes_to_row",
    "fit_of_codes",
    "is_tokenized",
    "read_tokenization",
    "row_to_codes",
]
