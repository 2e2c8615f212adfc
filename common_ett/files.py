"""Files that are there in whole or not at all, and files of other people."""

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


__all__ = ["read_fields", "remove_unfinished", "replacing"]
