"""Rows of the user's own data, and how one becomes an example."""

import itertools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ett.processing_ett import ImageError, MissingImageError

from .captions import caption_texts
from .codes import CODES_FEATURES, is_tokenized, read_tokenization, row_to_codes
from .conversations import ExampleError, read_conversation
from .filters import Columns
from .image_rows import (
    Rows,
    check_columns,
    check_images,
    data_folder,
    find_files,
    image_cells,
    image_name,
    open_images,
    read_rows,
    reading,
    undecoded,
)
from .selection import FilterChain
from .skipped import missing_data
from .tars import TarRows, find_tars, unify_row
from .tasks import TASKS, Task

OPTIONS = "data.image_column, data.text_column or data.messages_column"
ALIASES = {"image": "images", "messages": "conversations"}
"""What a column is also called; this is read where a dataset has it and not the other."""

FIRST_ROWS = 100
"""How many rows are looked at before anything else is done."""

UNUSABLE = (ExampleError, ImageError)
"""What makes a row one that is skipped, counted and named."""


@dataclass
class RowReader:
    """Makes examples of rows: `name`, `images` or `image_codes` and, by task, `text` or `messages`.

    Args:
        path (`str`): What errors call the dataset.
        task ([`Task`]): What is learned from the rows.
        image_folder (`str`): Folder to which names of images' files are relative.
        text_column (`str`): Of captions or prompts; where it holds several, one is drawn by the seed and the row's
            name, the same in every epoch.
        messages_column (`str`): Of conversations ([`read_conversation`]).
        is_tar (`bool`): Rows are those of a webdataset ([`unify_row`]).
        num_codes (`int`, *optional*): Size of the codebook, where rows have codes in the place of images.
        are_files_listed (`bool`): Whether the images are files that were listed when the dataset was opened.
    """

    path: str
    task: Task
    image_column: str = "image"
    text_column: str = "text"
    messages_column: str = "messages"
    image_folder: str = ""
    seed: int = 0
    is_tar: bool = False
    num_codes: int | None = None
    are_files_listed: bool = False

    def __post_init__(self):
        self._has_folder = Path(self.image_folder).is_dir()

    def name(self, row: dict[str, Any], number: int | str) -> str:
        """What to call a row: its image's file, or its key or number."""
        return row.get("__key__") or image_name(row.get(self.image_column), number)

    def __call__(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """
        Raises:
            ExampleError, ImageError: The row cannot be learned from.
            MissingDataError: Its image was there when the dataset was opened, or the folder of all images was.
        """
        row, cell = self._open(row)
        texts = self._texts(row, self._num_images(row, cell), name)
        if self.num_codes is not None:
            return {"name": name, "image_codes": row_to_codes(row, self.num_codes), **texts}
        return {"name": name, "images": self._images(cell, name), **texts}

    def check(self, rows: Iterable[dict[str, Any]]):
        """Looks at the first rows, whose images it does not open, for one that can be used.

        Raises:
            ValueError: None of them can be used.
        """
        first = None
        for number, row in enumerate(itertools.islice(rows, FIRST_ROWS)):
            name = self.name(row, number)
            try:
                row, cell = self._open(row)
                self._texts(row, self._num_images(row, cell), name)
                return
            except ExampleError as error:
                first = first or (name, error)
        if first:
            name, error = first
            raise ValueError(
                f"None of the first {number + 1} rows of '{self.path}' can be used; the first, {name}: {error}"
            ) from error

    def view(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as filters see it, with the columns that all datasets have; one that cannot be read as it is."""
        try:
            return self._open(row)[0]
        except ExampleError:
            return row

    def filters(self, settings: list[dict[str, Any]], columns: list[str] | None) -> FilterChain:
        """The filters of these data, of which columns are known unless they differ from row to row.

        Raises:
            ValueError: A setting is unusable, or a filter reads a column that is missing.
        """
        chain = FilterChain(settings, Columns(self.image_column, self.text_column, self.image_folder))
        if columns is not None and not self.is_tar:
            chain.require(columns)
        return chain

    def _open(self, row: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The row with the columns that all datasets have, and what its image column holds."""
        row = unify_row(row) if self.is_tar else row
        return row, row.get(self.image_column) if self.task.has_images else None

    def _images(self, cell: Any, name: str) -> list[Image.Image]:
        try:
            return open_images(cell, self.image_folder)
        except MissingImageError as error:
            if self.are_files_listed:
                raise missing_data(name) from error
            if self._has_folder and not Path(self.image_folder).is_dir():
                raise missing_data(self.image_folder) from error
            raise

    def _num_images(self, row: dict[str, Any], cell: Any) -> int:
        return len(image_cells(cell)) if self.num_codes is None else len(row["image_codes"])

    def _texts(self, row: dict[str, Any], num_images: int, name: str) -> dict[str, Any]:
        if self.task.column == "messages":
            column = self.messages_column
            if self.is_tar and column not in row:
                column = ALIASES.get(column, column)
            return {"messages": read_conversation(self._cell(row, column), num_images)}
        if self.task.has_images and not num_images:
            raise ExampleError(f"The row has no image in {self.image_column!r}.")
        if self.task.column is None:
            return {}
        cell = self._cell(row, self.text_column)
        texts = [text for text in caption_texts(cell) if text.strip() or self.task.predicts_codes]
        if not texts:
            raise ExampleError(f"Its {self.text_column!r} is {str(cell)[:60]!r}; expected text.")
        if len(texts) == 1:
            return {"text": texts[0]}
        rng = np.random.default_rng((self.seed, zlib.crc32(name.encode())))
        return {"text": texts[rng.integers(len(texts))]}

    def _cell(self, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise ExampleError(
                f"The row has no {column!r}, but {', '.join(sorted(map(repr, row)))}. Name yours with {OPTIONS}."
            )
        return row[column]


def open_rows(
    path: str,
    task: str,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "text",
    messages_column: str = "messages",
    image_folder: str | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> tuple[Rows | TarRows | list[str], RowReader]:
    """The rows of a dataset and what makes examples of them. Of local tars, when streaming, their paths.

    Raises:
        ValueError: The dataset cannot be read or is empty, a column is missing, or none of the first rows can be
            used.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"data.image_folder is '{image_folder}', which is no folder.")
    tars = find_tars(path)
    if tars:
        reader = RowReader(path, TASKS[task], image_column, text_column, messages_column, "", seed, is_tar=True)
        rows = TarRows(tars[:1] if streaming else tars)
        if not len(rows):
            causes = "; ".join(f"{path}: {cause}" for path, cause in rows.damaged.items())
            raise ValueError(f"'{path}' holds no examples. {causes}".strip())
        reader.check(rows[index] for index in range(len(rows)))
        return tars if streaming else rows, reader
    files = find_files(path, split)
    rows = read_rows(path, split, streaming, files)
    with reading(path):
        # Of datasets that are made row by row, columns are known only from a row.
        columns = rows.column_names or list(next(iter(rows), {}))
    image_column, messages_column = (
        ALIASES.get(column, column) if column not in columns and ALIASES.get(column) in columns else column
        for column in (image_column, messages_column)
    )
    reader = RowReader(
        path, TASKS[task], image_column, text_column, messages_column, image_folder or data_folder(path), seed
    )
    reader.is_tar = "__key__" in columns
    reader.are_files_listed = files is not None and files.are_images
    images = (image_column,)
    if reader.task.has_images and is_tokenized(path):
        reader.num_codes, images = read_tokenization(path)["num_codes"], tuple(CODES_FEATURES)
    if not reader.is_tar:
        needed = {"text": (text_column,), "messages": (messages_column,), None: ()}[reader.task.column]
        if reader.task.has_images and reader.task.column != "messages":
            needed = (*images, *needed)
        check_columns(path, columns, image_column, needed, OPTIONS)
        if reader.task.has_images and rows.features and image_column in rows.features:
            check_images(path, rows.features, image_column, OPTIONS)
    rows = undecoded(rows)
    with reading(path):
        first = list(rows.take(FIRST_ROWS))
    if not first:
        raise ValueError(f"'{path}' holds no examples.")
    reader.check(first)
    return rows, reader


__all__ = ["UNUSABLE", "RowReader", "open_rows"]
