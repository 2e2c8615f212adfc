"""The user's own datasets: rows whose images stay undecoded until [`load_image`] has looked at them."""

import base64
import binascii
import codecs
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ett.processing_ett.image_processing_ett import LONGEST_REASON
from ett.processing_ett.image_reading_ett import ImageError, find_same_name, load_image, read_image_size

from .local_files import TABLE_FORMATS, LocalFiles, find_local_files, list_files, match_files, read_captions

FILE_FORMATS = TABLE_FORMATS
"""Files that are a dataset by themselves, or several of them by a pattern such as `shards/*.tar`."""

CAPTION_SHARDS = 1024
"""Most shards in which images with caption files are streamed."""

TEXT_TYPES = ("string", "large_string", "string_view")
CONTENT_TYPES = ("binary", "large_binary", "binary_view")
LIST_TYPES = (datasets.List, datasets.LargeList)

URL_STARTS = ("http://", "https://", "data:image/")
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")
"""How base64 of the formats that are read begins: JPEG, PNG, GIF, WebP, BMP, TIFF (twice) and AVIF."""
LONGEST_NAME = 500
"""Characters above which an image's name is no use in a sentence."""

SHORTEST_BASE64 = 64
"""Fewer characters are the name of a file."""

Rows = datasets.Dataset | datasets.IterableDataset


def load_rows(
    path: str,
    split: str | None,
    image_column: str,
    columns: Iterable[str],
    options: str,
    image_folder: str | None = None,
) -> datasets.Dataset:
    """
    Reads a folder of images (with or without a `metadata.jsonl`: the imagefolder convention of datasets), or any
    dataset that [`read_rows`] takes, and decodes nothing.

    Args:
        path (`str`): Folder, file or name on the Hub.
        split (`str`, *optional*): Without it, the only one there is.
        image_column (`str`): Column of images, if there is one of that name.
        columns: Those that have to be there.
        options (`str`): What an error calls the options that name other columns.
        image_folder (`str`, *optional*): Folder to which images' file names are relative, by default that of the
            data.

    Returns:
        `datasets.Dataset`: One row or more, in the order of the dataset; images as [`open_images`] takes them.

    Raises:
        ValueError: The dataset cannot be read or is empty, a column is missing or holds no images, or `split` is
            not given and there are several.
    """
    rows = read_rows(path, split)
    check_columns(path, rows.column_names, image_column, columns, options)
    if not len(rows):
        raise ValueError(f"'{path}' holds no examples.")
    if image_column in rows.column_names:
        check_images(path, rows.features, image_column, options)
        rows = _with_images(rows, image_column, image_folder or data_folder(path))
    return undecoded(rows)


def _with_images(rows: datasets.Dataset, column: str, folder: str) -> datasets.Dataset:
    """The rows with images in a column where they have names of files, relative to `folder`."""
    feature = rows.features[column]
    several = isinstance(feature, LIST_TYPES)
    held = feature.feature if several else feature
    if not isinstance(held, datasets.Value) or held.dtype not in TEXT_TYPES:
        return rows
    sources = [[_source(name, folder) for name in image_cells(cell)] for cell in rows[column]]
    names = [[str(source) for source in own] for own in sources]
    if any(isinstance(source, bytes) for own in sources for source in own):
        names = [[_stored(source) for source in own] for own in sources]
    cells = names if several else [next(iter(own), None) for own in names]
    order, image = rows.column_names, datasets.Image(decode=False)
    feature = datasets.List(image) if several else image
    # The new column comes first: a table that has lost its only column has no rows.
    added = f"{column} as images"
    rows = rows.add_column(added, cells).cast_column(added, feature).remove_columns(column)
    return rows.rename_column(added, column).select_columns(order)


def _source(text: str, folder: str | Path) -> str | bytes | Path:
    """A text in an image column as a URL, the content that it holds in base64, or a file relative to `folder`."""
    if text.startswith(URL_STARTS):
        return text
    content = _decode_base64(text)
    if content is not None:
        return content
    path = Path(folder, text)
    return path if str(path).isascii() or os.path.isfile(path) else find_same_name(path) or path


def _stored(source: str | bytes | Path) -> dict[str, Any]:
    """A source as [`datasets.Image`] stores it."""
    return {"bytes": source, "path": None} if isinstance(source, bytes) else {"bytes": None, "path": str(source)}


def _decode_base64(text: str) -> bytes | None:
    """The content that a text holds in base64, or `None` for any other text."""
    if len(text) < SHORTEST_BASE64 or not text.startswith(BASE64_STARTS):
        return None
    letters = "".join(text.split())
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def read_rows(path: str, split: str | None, streaming: bool = False, files: LocalFiles | None = None) -> Rows:
    """
    Args:
        path (`str`): A folder, a name on the Hub, a file of [`FILE_FORMATS`], or a pattern of such files.
        split (`str`, *optional*): Without it, the only one there is.
        streaming (`bool`): Read rows only when they are asked for, and keep no copy of them.
        files ([`LocalFiles`], *optional*): What [`find_files`] has found, which is otherwise looked for.

    Raises:
        ValueError: The dataset cannot be read, or `split` is not given and there are several.
    """
    local = files or find_files(path, split)
    # By its full path: datasets would take a folder named "parquet" or "json" for the format.
    source, options = str(Path(path).resolve()) if Path(path).is_dir() else path, {}
    if local is not None:
        source, options = local.format, {"data_files": local.data_files()}
    elif "://" in path and Path(path).suffix in FILE_FORMATS:
        source, options = FILE_FORMATS[Path(path).suffix], {"data_files": path}
    elif Path(source).is_dir() and "[" in source:
        raise ValueError(
            f"'{path}': datasets reads this folder and takes the brackets in its path for a pattern; rename it."
        )
    captions = local.captions if local is not None else {}
    with reading(path):
        for file in [file for files in local.splits.values() for file in files] if local is not None else ():
            _check_first_row(file)
        splits = (
            [split] if split else list(local.splits) if local else datasets.get_dataset_split_names(source, **options)
        )
        rows = None
        if len(splits) == 1:
            rows = datasets.load_dataset(source, split=splits[0], streaming=streaming and not captions, **options)
    if rows is None:
        raise ValueError(f"'{path}' has the splits {', '.join(map(repr, splits))}; name the one to read.")
    return _with_captions(rows, captions, streaming) if captions else rows


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Within it, what readers of a dataset raise becomes a `ValueError` of one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Readers of damaged files raise almost any type.
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        if isinstance(cause, LookupError | TypeError | AttributeError) or not reason:
            # Their messages are hardly more than a name.
            reason = f"{type(cause).__name__}: {reason}"
        raise ValueError(f"'{path}' could not be read as a dataset: {reason:.{LONGEST_REASON}}") from error


def _check_first_row(file: str):
    """Raises `ValueError` where JSON begins with null in the place of a row, at which pyarrow's reader crashes."""
    if FILE_FORMATS.get(os.path.splitext(file)[1].lower()) != "json":
        return
    with open(file, "rb") as content:
        beginning = content.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip()
    if beginning.removeprefix(b"[").lstrip().startswith(b"null"):
        raise ValueError(f"the first row of '{file}' is null; expected a mapping of columns to values.")


def find_files(path: str, split: str | None) -> LocalFiles | None:
    """The files of a local dataset, where it is a folder, a file or a pattern that is read here.

    Raises:
        ValueError: The folder is empty, the file has another format, or no file matches the pattern.
    """
    place = Path(path)
    try:
        if place.is_dir():
            if not list_files(place):
                raise ValueError(
                    f"The folder '{path}' is empty; expected images and a metadata.jsonl of their texts, if they "
                    "have any."
                )
            return find_local_files(place, split)
        files = [path] if place.is_file() else match_files(path) if "*" in path and "://" not in path else None
    except OSError as error:
        raise ValueError(f"'{path}' could not be read as a dataset: {error}") from error
    if files is None:
        return None
    form = FILE_FORMATS.get(place.suffix.lower())
    if form is None:
        raise ValueError(
            f"'{path}' is no file that is read as a dataset; expected one of {', '.join(FILE_FORMATS)}, or a folder."
        )
    if not files:
        raise ValueError(f"'{path}' could not be read as a dataset: no file matches this pattern.")
    return LocalFiles(form, {"train": [str(Path(file).absolute()) for file in files]})


def _with_captions(rows: datasets.Dataset, captions: dict[str, list[str]], streaming: bool) -> Rows:
    """Rows of images with the columns of the caption files beside these."""
    cells = rows.cast_column("image", datasets.Image(decode=False))["image"]
    for name, values in read_captions([cell["path"] for cell in cells], captions).items():
        rows = rows.add_column(name, values)
    return rows.to_iterable_dataset(max(1, min(len(rows), CAPTION_SHARDS))) if streaming else rows


def check_columns(path: str, found: Iterable[str], image_column: str, columns: Iterable[str], options: str):
    """Raises `ValueError`, saying what there is and what to do, where one of `columns` is not among the `found`."""
    found = list(found)
    missing = [column for column in columns if column not in found]
    if not missing:
        return
    hint, folder = "", Path(path)
    if (
        missing != [image_column]
        and folder.is_dir()
        and not any(Path(file).name.startswith("metadata.") for file in list_files(folder))
    ):
        hint = " The folder has no metadata.jsonl with a line such as " + (
            '{"file_name": "photo.jpg", "text": "a caption"} for each image.'
        )
    raise ValueError(
        f"'{path}' has no column {', '.join(map(repr, missing))}; its columns are "
        f"{', '.join(map(repr, found)) or 'none'}. Name yours with {options}.{hint}"
    )


def check_images(path: str, features: datasets.Features, image_column: str, options: str):
    """Raises `ValueError` where a column can hold neither images nor their files' names."""
    feature = features[image_column]
    held = feature.feature if isinstance(feature, LIST_TYPES) else feature
    by_name = isinstance(held, datasets.Value) and held.dtype in (*TEXT_TYPES, *CONTENT_TYPES, "null")
    # Rows of which some have one image and some have several are of no one type.
    of_any_type = type(held).__name__ == "Json"
    if not (isinstance(held, (datasets.Image, dict)) or by_name or of_any_type):
        raise ValueError(
            f"The column {image_column!r} of '{path}' holds {feature}; expected images. Name another with {options}."
        )


def undecoded(rows: Rows) -> Rows:
    """The same rows, with the content or the file's name in the place of each image."""
    image = datasets.Image(decode=False)
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, image)
        elif isinstance(feature, LIST_TYPES) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, type(feature)(image))
    return rows


def data_folder(path: str) -> str:
    """The folder of a local dataset, to which file names in it are relative: itself, or that of its file."""
    return path if Path(path).is_dir() else str(Path(path).parent)


def image_cells(cell: Any) -> list[Any]:
    """The images of a row's image column, which holds nothing, one or a list of them: each `{"bytes", "path"}`, a
    file's name, its content, a URL or base64."""
    cells = cell if isinstance(cell, list) else [cell]
    return [image for image in cells if not _is_nothing(image)]


def _is_nothing(image: Any) -> bool:
    if isinstance(image, dict):
        return image.keys() <= {"bytes", "path"} and not any(image.values())
    return image is None or image in ("", b"")


def open_images(cell: Any, folder: str | Path = "") -> list[Image.Image]:
    """What a row's image column holds, as [`load_image`] opens each. Names of files are relative to `folder`.

    Raises:
        ImageError: An image cannot be read.
    """
    return [_read(load_image, image, folder) for image in image_cells(cell)]


def image_sizes(cell: Any, folder: str | Path = "") -> list[tuple[int, int]]:
    """Width and height of each image of such a cell, of which no more than the headers is read.

    Raises:
        ImageError: A header cannot be read.
    """
    return [_read(read_image_size, image, folder) for image in image_cells(cell)]


def _read(read: Callable[[str | Path | bytes], Any], image: Any, folder: str | Path) -> Any:
    source = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
    if not isinstance(source, (str, bytes)):
        raise ImageError(f"A row has {str(image)[:60]!r} for an image; expected a file's name or its content.")
    try:
        return read(_source(source, folder) if isinstance(source, str) else source)
    except OSError as error:
        raise ImageError(f"An image cannot be opened: {error.strerror or error}.") from error


def image_name(cell: Any, number: int | str) -> str:
    """What to call a row's image: its (first) file, or the row's number where there is none that can be named."""
    first = next(iter(image_cells(cell)), None)
    name = first.get("path") if isinstance(first, dict) else first
    is_name = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME
    if not is_name or name.startswith("data:") or _decode_base64(name) is not None:
        return f"row {number}"
    return name


__all__ = [
    "FILE_FORMATS",
    "LIST_TYPES",
    "Rows",
    "check_columns",
    "check_images",
    "data_folder",
    "find_files",
    "load_rows",
    "open_images",
    "image_cells",
    "image_name",
    "image_sizes",
    "read_rows",
    "reading",
    "undecoded",
]
