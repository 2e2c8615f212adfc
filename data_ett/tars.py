"""Shards of a webdataset: tar files in which the files of one name are one row (`0001.jpg`, `0001.txt`, `0001.json`).

- Rows are read where they lie, by the places that a tar's headers give: nothing is unpacked or copied.
- What is cut off at the end of a damaged shard is left out; the rows before it are there.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .conversations import ExampleError
from .local_files import clean_text, list_files, match_files

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")

Place = tuple[int, int]
"""Where a file begins in its tar, and how many bytes it has."""


class Sample(NamedTuple):
    """The files of one row: their common name, and each one's place by what its name ends in."""

    key: str
    files: dict[str, Place]


def find_tars(path: str) -> list[str]:
    """The tar files that a path means: itself, or those of a folder or a pattern; none where it is something else."""
    folder = Path(path)
    if folder.is_dir():
        return [found for found in list_files(folder) if found.endswith(".tar")]
    if folder.suffix != ".tar":
        return []
    return [path] if folder.is_file() else match_files(path)


def index_tar(path: str) -> tuple[list[Sample], str | None]:
    """The rows of a tar, in its order, and what is wrong with it, if anything is. Only headers are read."""
    samples: list[Sample] = []
    size = Path(path).stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or _is_hidden(member.name):
                    continue
                if member.offset_data + member.size > size:
                    return samples, f"it is cut off within '{member.name}'"
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                # A second file of the same name begins another row.
                if not samples or samples[-1].key != key or suffix.lower() in samples[-1].files:
                    samples.append(Sample(key, {}))
                samples[-1].files[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        return samples, str(error)
    return samples, None


def _is_hidden(name: str) -> bool:
    """Whether a member is one that macOS adds (`._0001.jpg`, `__MACOSX`), or hidden otherwise."""
    *folders, name = name.split("/")
    return name.startswith(".") or "__MACOSX" in folders


def read_samples(path: str, samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """The rows of an indexed tar, with each file's content under what its name ends in."""
    with open(path, "rb") as file:
        for sample in samples:
            row: dict[str, Any] = {"__key__": sample.key, "__url__": path}
            for suffix, (offset, size) in sample.files.items():
                file.seek(offset)
                row[suffix] = file.read(size)
            yield row


def unify_row(row: dict[str, Any]) -> dict[str, Any]:
    """A webdataset's row with the columns that other datasets have: `image`, the images under whatever suffix they
    stand; `text`, what stands under txt; and each field of its json.

    Args:
        row: Files by suffix, as bytes or as datasets decodes them.

    Raises:
        ExampleError: The json is none.
    """
    filled = {suffix: content for suffix, content in row.items() if content is not None}
    fields = filled.get("json", {})
    try:
        fields = json.loads(fields) if isinstance(fields, (bytes, str)) else fields
    except ValueError as error:
        raise ExampleError(f"Its json cannot be read: {error}.") from error
    if not isinstance(fields, dict):
        raise ExampleError(f"Its json holds a {type(fields).__name__}; expected fields and their values.")
    unified = {**fields, **filled}
    if isinstance(text := filled.get("txt"), (bytes, str)):
        unified["text"] = clean_text(text if isinstance(text, bytes) else text.encode())
    images = [
        content if isinstance(content, dict) else {"bytes": content, "path": f"{row['__key__']}.{suffix}"}
        for suffix, content in filled.items()
        if suffix.rsplit(".")[-1] in IMAGE_SUFFIXES
    ]
    if images:
        unified["image"] = images
    return unified


class TarRows:
    """All rows of some tars, by number.

    Attributes:
        damaged (`dict[str, str]`): Shards that could not be read to their end, and why.
    """

    def __init__(self, paths: list[str]):
        self.paths, self.places, self.damaged = paths, [], {}
        for number, path in enumerate(paths):
            samples, damage = index_tar(path)
            self.places += [(number, sample) for sample in samples]
            if damage:
                self.damaged[path] = damage

    def __len__(self) -> int:
        return len(self.places)

    def fingerprint(self) -> list[Any]:
        """What changes when the files do: their names, sizes and times."""
        return [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self.paths]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, sample = self.places[index]
        return next(read_samples(self.paths[number], [sample]))


__all__ = ["TarRows", "find_tars", "index_tar", "read_samples", "unify_row"]
