"""Files that are there in whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def remove_unfinished(folder: str | Path):
    """Removes what [`replacing`] leaves in a folder and below it when its process is killed. No other process may be
    writing there."""
    for path in Path(folder).rglob(f".*{SUFFIX}"):
        path.unlink(missing_ok=True)


__all__ = ["remove_unfinished", "replacing"]
