"""The user's own data sets: rows whose pictures stay undecoded until [`load_image`] has looked at them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from PIL import Image

from .image_processing_ett import load_image, read_image_size


def load_rows(
    path: str, split: str | None, image_column: str, columns: Iterable[str], options: str
) -> datasets.Dataset:
    """
    Reads a folder of pictures (with or without a `metadata.jsonl`: the imagefolder convention of datasets), or any
    data set that [`datasets.load_dataset`] takes, and decodes nothing.

    Args:
        path (`str`): Folder, file or name on the Hub.
        split (`str`, *optional*): Without it, the only one there is.
        image_column (`str`): Column of pictures, if there is one of that name.
        columns: Those that have to be there.
        options (`str`): What an error calls the options that name other columns.

    Returns:
        `datasets.Dataset`: One row or more, in the order of the data set; pictures as [`open_pictures`] takes them.

    Raises:
        ValueError: The data set cannot be read or is empty, a column is missing or holds no pictures, or `split` is
            not given and there are several.
    """
    folder = Path(path)
    if folder.is_dir() and not any(entry.is_file() for entry in folder.rglob("*")):
        raise ValueError(
            f"The folder '{path}' is empty; expected pictures and a metadata.jsonl of their texts, if they have any."
        )
    try:
        splits = [split] if split else datasets.get_dataset_split_names(path)
        rows = datasets.load_dataset(path, split=splits[0]) if len(splits) == 1 else None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"'{path}' could not be read as a data set: {cause}") from error
    if rows is None:
        raise ValueError(f"'{path}' has the splits {', '.join(map(repr, splits))}; name the one to read.")
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        hint = ""
        if missing != [image_column] and folder.is_dir() and not list(folder.rglob("metadata.*")):
            hint = " The folder has no metadata.jsonl with a line such as " + (
                '{"file_name": "photo.jpg", "text": "a caption"} for each picture.'
            )
        raise ValueError(
            f"'{path}' has no column {', '.join(map(repr, missing))}; its columns are "
            f"{', '.join(map(repr, rows.column_names)) or 'none'}. Name yours with {options}.{hint}"
        )
    if not len(rows):
        raise ValueError(f"'{path}' holds no examples.")
    if image_column not in rows.column_names:
        return rows
    try:
        return rows.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"The column {image_column!r} of '{path}' holds {rows.features[image_column]}; expected pictures. Name "
            f"another with {options}."
        ) from error


def open_pictures(cell: Any) -> list[Image.Image]:
    """What a row's image column holds (nothing, a picture or a list of them), as [`load_image`] opens each.

    Raises:
        ImageError: A picture cannot be read.
    """
    return [load_image(source) for source in _sources(cell)]


def picture_sizes(cell: Any) -> list[tuple[int, int]]:
    """Width and height of each picture of such a cell, of which no more than the headers is read.

    Raises:
        ImageError: A header cannot be read.
    """
    return [read_image_size(source) for source in _sources(cell)]


def _sources(cell: Any) -> list[bytes | str]:
    pictures = cell if isinstance(cell, list) else [cell] if cell is not None else []
    return [picture["bytes"] or picture["path"] for picture in pictures]


def picture_name(cell: Any, number: int) -> str:
    """What to call a row's picture: its file, or the row's number where there is none."""
    return str((isinstance(cell, dict) and cell["path"]) or f"row {number}")


__all__ = ["load_rows", "open_pictures", "picture_name", "picture_sizes"]
