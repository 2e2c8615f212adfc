"""The files of a local dataset: their format, their splits and the captions beside images.

- datasets puts a file into the test split where its name contains a word such as `test`. Here splits come from folders
  that are named exactly as a split, in a dataset that holds nothing else.
- datasets receives finished lists of files, so that brackets in names are not patterns.
- A visible file counts once. Hidden files and `__MACOSX`, which macOS writes, do not count.
"""

import glob
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.data_files import DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

TABLE_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tar": "webdataset",
}
"""Format of datasets by the suffix of a file that holds rows."""

IMAGE_FORMAT = "imagefolder"
IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
CAPTION_SUFFIXES = (".txt", ".json")
CAPTION_FIELDS = ("caption", "description")
"""Fields of a caption file in JSON that give the text where it has no `text`."""
MAX_CAPTION_BYTES = 2**20
"""Longest caption file that is read."""

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Split by the exact name of a folder, or of a file without its suffix."""

IGNORED_NAMES = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
SAVED_NAMES = ("state.json", "dataset_dict.json", ".huggingface.yaml")
"""Files of folders that datasets describes itself."""

HUB_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\.\w+")
"""Name of a shard in the folder `data`, as `push_to_hub` writes it: the split comes first."""

Splits = dict[str, list[str]]


@dataclass
class LocalFiles:
    """The files of a local dataset.

    Args:
        format: Name of the builder of datasets.
        splits: Paths by split.
        captions: Caption files by the path of their image, those that take precedence last.
    """

    format: str
    splits: Splits
    captions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def are_images(self) -> bool:
        """Whether they are images alone, without a table of metadata: each was there when the folder was listed."""
        paths = [path for own in self.splits.values() for path in own]
        return self.format == IMAGE_FORMAT and not any(
            os.path.basename(path) in ImageFolder.METADATA_FILENAMES for path in paths
        )

    def data_files(self) -> dict[str, DataFilesList]:
        """The splits as `datasets.load_dataset` takes them. Their hash changes when a file's size or time does."""
        return {split: DataFilesList(files, [_state(file) for file in files]) for split, files in self.splits.items()}


def list_files(folder: str | Path) -> list[str]:
    """Every visible file below a folder, in the order of the paths. Links to folders are followed."""
    found: list[str] = []

    def look(place: str, above: frozenset[str]):
        real = os.path.realpath(place)
        if real in above:  # A link to a folder that contains it has no end.
            return
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    look(entry.path, above | {real})
                elif entry.is_file():
                    found.append(entry.path)

    look(str(folder), frozenset())
    return sorted(found)


def match_files(pattern: str) -> list[str]:
    """Local files that a pattern matches. Brackets are characters of a name where such a file exists."""
    for candidate in (pattern.replace("[", "[[]"), pattern):
        if found := sorted(path for path in glob.glob(candidate, recursive=True) if os.path.isfile(path)):
            return found
    return []


def find_local_files(folder: str | Path, split: str | None = None) -> LocalFiles | None:
    """
    The files of a folder that holds images or tables.

    Args:
        folder (`str` or `Path`): An existing folder.
        split (`str`, *optional*): Split to read. It decides for a folder whose only table is named as a split.

    Returns:
        `LocalFiles`, or `None` for a folder that datasets describes itself or that holds other files.
    """
    folder = str(Path(folder).resolve())
    files = list_files(folder)
    images = [path for path in files if _suffix(path) in IMAGE_SUFFIXES]
    captions = find_captions(images, files)
    beside_images = {path for own in captions.values() for path in own}
    if _is_described(folder, beside_images):
        return None
    metadata, tables = [], defaultdict(list)
    for path in files:
        if os.path.basename(path) in IGNORED_NAMES:
            continue
        if images and os.path.basename(path) in ImageFolder.METADATA_FILENAMES:
            metadata.append(path)
        elif _suffix(path) in TABLE_FORMATS and path not in beside_images:
            tables[TABLE_FORMATS[_suffix(path)]].append(path)
    if shards := _hub_shards(folder, [path for own in tables.values() for path in own]):
        return shards
    form = max(tables, key=lambda name: len(tables[name]), default=None)
    if images and (metadata or form is None or len(images) > len(tables[form])):
        splits = _split_by_folders(folder, sorted(images + metadata))
        return LocalFiles(IMAGE_FORMAT, splits, {} if metadata else captions)
    if form is None:
        return None
    return LocalFiles(form, _split_tables(folder, tables[form], split))


def find_captions(images: list[str], files: list[str]) -> dict[str, list[str]]:
    """
    Caption files by image: `0001.txt` and `0001.json` beside `0001.jpg`, and `0001.jpg.json` or any other file of
    text or JSON whose name begins with the image's and a dot.

    Args:
        images (`list[str]`): Paths of images.
        files (`list[str]`): Paths among which caption files are looked for.

    Returns:
        `dict[str, list[str]]`: Paths of caption files by image, `.json` before `.txt`.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for image in images:
        by_stem[os.path.splitext(image)[0]].append(image)
        by_stem[image].append(image)
    captions: dict[str, list[str]] = defaultdict(list)
    for suffix in (".json", ".txt"):
        for path in files:
            if _suffix(path) == suffix:
                for image in _captioned(path, by_stem):
                    captions[image].append(path)
    return dict(captions)


def _captioned(path: str, by_stem: dict[str, list[str]]) -> list[str]:
    """The images that a caption file belongs to."""
    folder, name = os.path.split(path)
    ends = [place for place, letter in enumerate(name) if letter == "."]
    if images := by_stem.get(os.path.join(folder, name[: ends[-1]])):
        return images
    # Google Takeout writes `0001.jpg.supplemental-metadata.json`.
    longer = (by_stem.get(os.path.join(folder, name[:end]), []) for end in reversed(ends[:-1]))
    images = next(filter(None, longer), [])
    return [image for image in images if name.startswith(os.path.basename(image))]


def read_captions(images: list[str], captions: dict[str, list[str]]) -> dict[str, list[Any]]:
    """
    Columns of the caption files of images.

    Args:
        images (`list[str]`): Paths of the images, in the order of the rows.
        captions (`dict[str, list[str]]`): As of [`find_captions`].

    Returns:
        `dict[str, list]`: `text` from `.txt` files and the fields of `.json` files, with one value for each image and
        `None` where a file lacks one. Values of a column that are of several types are text.
    """
    rows = []
    for image in images:
        row: dict[str, Any] = {}
        for path in captions.get(image, ()):
            row |= _read_caption(path)
        if "text" not in row:
            row |= next(({"text": row[name]} for name in CAPTION_FIELDS if row.get(name)), {})
        rows.append(row)
    taken = ("image", "images", "label")
    names = {name: None for row in rows for name in row if name not in taken and not name.startswith("__")}
    return {name: _of_one_type([row.get(name) for row in rows]) for name in names}


def clean_text(content: bytes) -> str:
    """The text of a file without its byte order mark and without white space around it; lines end in a line feed."""
    text = content.decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _read_caption(path: str) -> dict[str, Any]:
    """The fields of a caption file. There are none where the file cannot be read."""
    try:
        if os.path.getsize(path) > MAX_CAPTION_BYTES:
            return {}
        text = clean_text(Path(path).read_bytes())
        if _suffix(path) == ".txt":
            return {"text": text}
        fields = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return {_valid(name): value for name, value in fields.items()} if isinstance(fields, dict) else {}


def _of_one_type(values: list[Any]) -> list[Any]:
    values = [_valid(value) for value in values]
    given = [value for value in values if value is not None]
    for is_kind in (_is_text, _is_whole, _is_number, _is_texts):
        if all(map(is_kind, given)):
            return values
    return [value if value is None or _is_text(value) else json.dumps(value) for value in values]


def _valid(value: Any) -> Any:
    """A text, or a list of texts, without halves of characters, which JSON may hold and Arrow may not."""
    if isinstance(value, list):
        return [_valid(one) for one in value] if _is_texts(value) else value
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _split_by_folders(folder: str, data: list[str]) -> Splits:
    """Files by split where they lie in nothing but folders named as splits, else all of them as `train`."""
    depth = len(folder.rstrip(os.sep).split(os.sep))
    parts = [path.split(os.sep)[depth:] for path in data]
    while all(len(own) > 1 for own in parts):
        names = {own[0] for own in parts}
        if all(name.lower() in SPLIT_NAMES for name in names):
            return _grouped(data, [SPLIT_NAMES[own[0].lower()] for own in parts])
        if len(names) > 1:
            break
        parts = [own[1:] for own in parts]
    return {"train": data}


def _split_tables(folder: str, data: list[str], wanted: str | None) -> Splits:
    """As [`_split_by_folders`]; tables that are all named exactly as splits, such as `test.jsonl`, are splits, too."""
    names = [match[1] if (match := _match_shard(path)) else Path(path).stem for path in data]
    if all(name.lower() in SPLIT_NAMES for name in names):
        splits = _grouped(data, [SPLIT_NAMES[name.lower()] for name in names])
        if len(splits) > 1 or (wanted or "").partition("[")[0] in splits:
            return splits
    return _split_by_folders(folder, data)


def _hub_shards(folder: str, tables: list[str]) -> LocalFiles | None:
    """The shards in the folder `data`, if there are any: then they alone are the dataset."""
    shards = [path for path in tables if os.path.dirname(path) == os.path.join(folder, "data") and _match_shard(path)]
    if not shards:
        return None
    formats = [TABLE_FORMATS[_suffix(path)] for path in shards]
    form = max(formats, key=formats.count)
    shards = [path for path, own in zip(shards, formats, strict=True) if own == form]
    return LocalFiles(form, _grouped(shards, [_match_shard(path)[1] for path in shards]))


def _match_shard(path: str) -> re.Match[str] | None:
    return HUB_SHARD.fullmatch(os.path.basename(path))


def _grouped(data: list[str], splits: list[str]) -> Splits:
    usual = list(dict.fromkeys(SPLIT_NAMES.values()))
    order = sorted(set(splits), key=lambda name: (usual.index(name) if name in usual else len(usual), name))
    return {name: [path for path, own in zip(data, splits, strict=True) if own == name] for name in order}


def _is_described(folder: str, captions: set[str]) -> bool:
    """Whether a folder says itself what its files are: in the head of a README.md, or as `save_to_disk` writes it. A
    `state.json` beside a `state.jpg` is a caption file."""
    saved = (os.path.join(folder, name) for name in SAVED_NAMES)
    if any(os.path.isfile(path) and path not in captions for path in saved):
        return True
    try:
        card = Path(folder, "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    return re.search(r"^(configs|dataset_info):", head, re.MULTILINE) is not None


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _state(file: str) -> tuple[str, str]:
    found = os.stat(file)
    return str(found.st_size), str(found.st_mtime_ns)


__all__ = [
    "IMAGE_FORMAT",
    "TABLE_FORMATS",
    "LocalFiles",
    "clean_text",
    "find_captions",
    "find_local_files",
    "list_files",
    "match_files",
    "read_captions",
]
