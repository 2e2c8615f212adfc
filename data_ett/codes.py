"""Data sets of image codes, which `ett tokenize` makes of pictures: a frozen tokenizer gives the same codes for ever.

Of a row's pictures there are the column `image_codes`, the bits of all their codes one after the other, and
`image_codes_shape`, `(num_images, h, w)`. The folder's `tokenization.json` says which tokenizer made them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from .shards import read_record

TOKENIZATION_NAME = "tokenization.json"
CODES_FEATURES = datasets.Features(
    {
        "image_codes": datasets.Value("binary"),
        "image_codes_shape": datasets.List(datasets.Value("int32"), length=3),
    }
)


def is_tokenized(path: str | Path) -> bool:
    """Whether this is a folder that `ett tokenize` wrote, or is about to."""
    return (Path(path) / TOKENIZATION_NAME).is_file()


def read_tokenization(path: str | Path) -> dict[str, Any]:
    """What made a folder's codes: `fingerprint`, `num_codes`, `model`, `image_size` and other settings.

    Raises:
        ValueError: Its `tokenization.json` is damaged.
    """
    return read_record(path, TOKENIZATION_NAME)


def fit_of_codes(record: dict[str, Any]) -> str:
    """How images were fitted before they became codes: `fit` of the image processor, by a folder's record."""
    crop = record["preprocessing"]["crop"]
    return "crop" if crop == "centre" else crop


def bits_per_code(num_codes: int) -> int:
    """Bits that hold any of so many codes.

    >>> bits_per_code(131072), bits_per_code(131073), bits_per_code(1)
    (17, 18, 1)
    """
    return max(1, (num_codes - 1).bit_length())


def pack_codes(codes: torch.LongTensor | np.ndarray, num_codes: int) -> bytes:
    """Codes of any shape, in `[0, num_codes)`, to [`bits_per_code`] bits each, highest bit first, in raster order; the
    last byte is filled up with zeros.

    For 131,072 codes these are 2,176 bytes for 32 x 32 codes. Parquet's own encodings of integers take from 2,251
    (byte stream split and zstd) to 3,393 bytes (its default and zstd) for the evenly used codes of a good tokenizer.

    Raises:
        ValueError: A code is out of range.
    """
    codes = np.asarray(codes)
    if codes.size and not 0 <= codes.min() <= codes.max() < num_codes:
        raise ValueError(f"Codes lie between {codes.min()} and {codes.max()}; expected 0 to {num_codes - 1}.")
    octets = codes.astype(">u4").reshape(-1, 1).view(np.uint8)
    return np.packbits(np.unpackbits(octets, axis=1)[:, -bits_per_code(num_codes) :]).tobytes()


def unpack_codes(packed: bytes, shape: Sequence[int], num_codes: int) -> torch.LongTensor:
    """What [`pack_codes`] packed.

    Raises:
        ValueError: There are more or fewer bytes than the shape needs, or a code is out of range.
    """
    count, bits = math.prod(shape), bits_per_code(num_codes)
    expected = math.ceil(count * bits / 8)
    if len(packed) != expected:
        raise ValueError(
            f"Codes of shape {tuple(shape)} with {bits} bits each take {expected} bytes; there are {len(packed)}. "
            "Were they packed for another number of codes?"
        )
    flags = np.zeros((count, 32), np.uint8)
    flags[:, 32 - bits :] = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits).reshape(count, bits)
    codes = np.packbits(flags, axis=1).view(">u4").astype(np.int64).reshape(shape)
    if count and codes.max() >= num_codes:
        raise ValueError(f"There is a code {codes.max()}; expected 0 to {num_codes - 1}. The data are damaged.")
    return torch.from_numpy(codes)


def pack_row(codes: torch.LongTensor | None, num_codes: int) -> dict[str, Any]:
    """The columns of a row's pictures, of which there may be none: `codes` is `(num_images, h, w)`."""
    codes = torch.zeros(0, 0, 0, dtype=torch.long) if codes is None else codes
    return {"image_codes": pack_codes(codes, num_codes), "image_codes_shape": list(codes.shape)}


def unpack_row(row: dict[str, Any], num_codes: int) -> torch.LongTensor:
    """The codes `(num_images, h, w)` of a row's pictures."""
    return unpack_codes(row["image_codes"], row["image_codes_shape"], num_codes)


__all__ = [
    "CODES_FEATURES",
    "TOKENIZATION_NAME",
    "bits_per_code",
    "fit_of_codes",
    "is_tokenized",
    "pack_codes",
    "pack_row",
    "read_tokenization",
    "unpack_codes",
    "unpack_row",
]
