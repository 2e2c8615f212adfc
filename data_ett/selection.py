"""A recipe's filters, applied: to all rows before training, or to the rows of a stream as they come."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ett.common_ett.files import replacing
from ett.processing_ett.image_reading_ett import find_same_name

from .filters import Columns, Row, build_filter
from .image_rows import image_cells
from .tars import TarRows

BATCH_SIZE = 64


class FilterChain:
    """A recipe's `data.filters`, one after the other: each sees what those before it kept.

    Args:
        settings (`list[dict]`): Of each filter its `type` and fields.
        columns ([`Columns`]): What the data call images and captions.

    Raises:
        ValueError: A type, field or value is unknown or unusable.
    """

    def __init__(self, settings: list[dict[str, Any]], columns: Columns | None = None):
        self.settings, self.columns = settings, columns or Columns()
        self.steps = [build_filter(one, self.columns) for one in settings]
        self.seen, self.removed = [0] * len(self.steps), [0] * len(self.steps)

    def reads(self) -> list[str]:
        """The columns that its filters read."""
        return list(dict.fromkeys(step.reads() for step in self.steps))

    def keep(self, rows: list[Row]) -> list[bool]:
        """Whether each row passes every filter. Rows are given in the order of the data, and each but once: what is
        removed is counted, what was seen is remembered."""
        return [
            passed
            for start in range(0, len(rows), BATCH_SIZE)
            for passed in self._keep(rows[start : start + BATCH_SIZE])
        ]

    def _keep(self, rows: list[Row]) -> list[bool]:
        left = list(range(len(rows)))
        for number, step in enumerate(self.steps):
            passed = step.keep([rows[index] for index in left])
            self.seen[number] += len(left)
            self.removed[number] += passed.count(False)
            left = list(itertools.compress(left, passed))
        kept = set(left)
        return [index in kept for index in range(len(rows))]

    def require(self, columns: list[str]):
        """Raises `ValueError` where a filter reads a column that is not among these."""
        missing = [column for column in self.reads() if column not in columns]
        if missing:
            raise ValueError(
                f"data.filters read the column {', '.join(map(repr, missing))}, which the data do not have; their "
                f"columns are {', '.join(map(repr, columns))}."
            )

    def report(self, counts: list[tuple[list[int], list[int]]] | None = None) -> list[dict[str, Any]]:
        """Each filter's settings with how many rows it has `seen` and `removed`; given `counts`, both lists of several
        chains like this, their sums."""
        counts = [(self.seen, self.removed)] if counts is None else counts
        sums = np.sum(counts, axis=0, dtype=int).tolist() if counts else [[0] * len(self.steps)] * 2
        return [
            {**one, "seen": seen, "removed": removed} for one, seen, removed in zip(self.settings, *sums, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Counts, and what filters remember, in JSON's types; grows with the images that are kept, where near
        duplicates are removed."""
        return {
            "seen": list(self.seen),
            "removed": list(self.removed),
            "memories": [step.state() for step in self.steps],
        }

    def load_state_dict(self, state: dict[str, Any] | None):
        """Goes on from a state, or from the start."""
        if state is None:
            state = {name: [0] * len(self.steps) for name in ("seen", "removed")} | {
                "memories": [""] * len(self.steps)
            }
        self.seen, self.removed = list(state["seen"]), list(state["removed"])
        for step, memory in zip(self.steps, state["memories"], strict=True):
            step.restore(memory)

    def forget(self):
        """Makes filters remember nothing, since in a new epoch every image is its own duplicate; counts go on."""
        for step in self.steps:
            step.restore("")


def select_rows(
    rows: datasets.Dataset | TarRows, chain: FilterChain, view: Callable[[Row], Row] | None = None
) -> np.ndarray:
    """
    Numbers of the rows that pass every filter. They and the counts are written into the cache of datasets, so that the
    same filters need not look at the same rows again. Rows are the same while their table is the same and no image
    file that they name has another size or modification time. The content of image files is not compared.

    Args:
        view: Makes of a row what filters see. Without it, only the columns that filters read are read.

    Raises:
        ValueError: No row is left.
    """
    cache = _cache_file(rows, chain)
    if cache.is_file():
        with safe_open(cache, "pt") as file:
            kept = file.get_tensor("kept").numpy()
            chain.seen, chain.removed = file.get_tensor("seen").tolist(), file.get_tensor("removed").tolist()
    else:
        kept = _pass(rows, chain, view) if view else _pass(rows.select_columns(chain.reads()), chain, dict)
        counts = {"seen": torch.tensor(chain.seen), "removed": torch.tensor(chain.removed)}
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as temporary:
            save_file({"kept": torch.from_numpy(kept), **counts}, temporary)
    if not len(kept):
        raise ValueError(f"data.filters leave none of the {len(rows)} rows: {summarize(chain.report())}.")
    return kept


def summarize(report: list[dict[str, Any]]) -> str:
    """What each filter removed, in a line."""
    return ", ".join(f"{one['type']} removed {one['removed']:,} of {one['seen']:,}" for one in report)


def _pass(rows: datasets.Dataset | TarRows, chain: FilterChain, view: Callable[[Row], Row]) -> np.ndarray:
    kept: list[int] = []
    with tqdm(total=len(rows), desc="Filtering", unit=" rows", leave=False, disable=None) as bar:
        for start in range(0, len(rows), BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, len(rows)))
            kept += itertools.compress(numbers, chain.keep([view(rows[number]) for number in numbers]))
            bar.update(len(numbers))
            bar.set_postfix(kept=len(kept), refresh=False)
    return np.array(kept, dtype=np.int64)


def _cache_file(rows: datasets.Dataset | TarRows, chain: FilterChain) -> Path:
    if isinstance(rows, datasets.Dataset):
        opens_images = chain.columns.image in chain.reads()
        content = [rows._fingerprint, _image_states(rows, chain.columns) if opens_images else None]
    else:
        content = rows.fingerprint()
    steps = [dataclasses.asdict(step) for step in chain.steps]
    key = hashlib.sha256(json.dumps([content, chain.settings, steps], sort_keys=True).encode())
    return Path(datasets.config.HF_DATASETS_CACHE) / "ett_filters" / f"{key.hexdigest()}.safetensors"


def _image_states(rows: datasets.Dataset, columns: Columns) -> str:
    """A digest of the size and the modification time of every image file that the rows name."""
    digest = hashlib.sha256()
    for name in _image_names(rows, columns.image):
        try:
            path = Path(columns.folder, name)
            found = os.stat(path if os.path.exists(path) else find_same_name(path) or path)
            state = [name, found.st_size, found.st_mtime_ns]
        except (OSError, ValueError):  # Missing, or an address or content in the place of a name.
            state = [name, None, None]
        digest.update(json.dumps(state).encode())
    return digest.hexdigest()


def _image_names(rows: datasets.Dataset, column: str) -> Iterator[str]:
    """Names of the image files in a column. Images within the table are passed over and not read."""
    feature = rows.features[column]
    if type(feature).__name__ == "Json":
        for cell in rows.select_columns(column)[column]:
            yield from (name for name in image_cells(cell) if isinstance(name, str))
        return
    for table in rows.select_columns(column).with_format("arrow").iter(BATCH_SIZE * 16):
        for chunk in table.column(column).chunks:
            yield from filter(None, _names_in(chunk).to_pylist())


def _names_in(cells: pyarrow.Array) -> pyarrow.Array:
    """The names in cells of names, of structs of `path` and `bytes`, or of lists of either."""
    kinds = pyarrow.types
    while kinds.is_list(cells.type) or kinds.is_large_list(cells.type) or kinds.is_fixed_size_list(cells.type):
        cells = cells.flatten()
    if kinds.is_struct(cells.type):
        fields = [field.name for field in cells.type]
        if "path" not in fields:
            return pyarrow.array([], pyarrow.string())
        names = pyarrow.compute.struct_field(cells, "path")
        if "bytes" in fields:
            is_file = pyarrow.compute.is_null(pyarrow.compute.struct_field(cells, "bytes"))
            names = names.filter(is_file)
        cells = names
    is_text = kinds.is_string(cells.type) or kinds.is_large_string(cells.type) or kinds.is_string_view(cells.type)
    return cells if is_text else pyarrow.array([], pyarrow.string())


__all__ = ["FilterChain", "select_rows", "summarize"]
