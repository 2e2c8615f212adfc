"""Files that are there in whole or not at all, and files of other people."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = ".tmp"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to, which takes the place of `path` when all is written, and is removed
    otherwise. Several machines may write the same file, each under a name of its own."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{SUFFIX}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text file whole, see [`replacing`]. Returns its path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Writes plain values as a JSON file, whole. Returns its path."""
    return write_text(path, json.dumps(value, indent=2))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no JSON, or holds no mapping.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"'{path}' holds a {type(fields).__name__}; expected a mapping of fields to values.")
    return fields


def remove_unfinished(folder: str | Path):
    """Removes what [`replacing`] leaves in a folder and below it when its process is killed. No other process may be
    writing there."""
    for path in Path(folder).rglob(f".*{SUFFIX}"):
        path.unlink(missing_ok=True)


__all__ = ["read_fields", "remove_unfinished", "replacing", "sha256_of", "write_json", "write_text"]
