"""Datasets that are made of others: Parquet shards, resumable, by one machine or several.

- A shard is made of a fixed range of the source's rows, so that any number of machines write the same files.
- A shard appears under its name when it is whole, and its manifest (rows, skipped rows, SHA-256) after it; what has
  both and agrees is kept when the same work is started again.
- The folder is a dataset as `datasets.load_dataset(FOLDER)` takes it. Its record, a JSON file, says what it was made
  of and with which settings; nothing made with others is put beside it.
"""

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.table import embed_table_storage
from tqdm.auto import tqdm

from ett.common_ett.files import replacing, sha256_of, write_json

ROWS_PER_GROUP = 256
"""Rows that are held in memory and written together."""
MAX_SHARDS = 99_999
"""As many as the names have room for."""
PROBLEMS_SHOWN = 3


@dataclass
class Skipped:
    """A row of the source that has no place in the shards: what it is called, and why it is left out."""

    name: str
    reason: str


RowMaker = Callable[[range], Iterable[dict[str, Any] | Skipped]]
"""Numbers of rows of the source to one new row, or the reason why there is none, for each of them in order."""


@dataclass
class Part:
    """One machine's share of the shards: every `count`-th, from `index` on.

    >>> Part.parse("1/4")
    Part(index=1, count=4)
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Reads `index/count`, counted from 0.

        Raises:
            ValueError: It is nothing of the kind.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(
                f"The shard is {text!r}; expected the machine's number, from 0, and how many there are, such as 0/4 "
                "to 3/4."
            )
        return cls(int(match[1]), int(match[2]))


@dataclass
class ShardsReport:
    """What one call of [`write_shards`] did.

    Args:
        rows: New rows in this machine's shards.
        skipped: Of each row left out of them its `row` (number in the source), `name` and `reason`.
        read: Rows of the source that were read now; the others' shards were there already.
        seconds: How long that took.
        images: Images in those rows, where the maker of rows counts them.
        missing: Names of shards that other machines have still to write.
    """

    rows: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    seconds: float = 0.0
    images: int = 0
    missing: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{self.rows:,} rows, {len(self.skipped):,} skipped."]
        lines += [f"  {entry['name']}: {entry['reason']}" for entry in self.skipped[:PROBLEMS_SHOWN]]
        if len(self.skipped) > PROBLEMS_SHOWN:
            lines.append(f"  and {len(self.skipped) - PROBLEMS_SHOWN} more, all named in the manifest.")
        if self.images:
            lines.append(f"{self.images:,} images, {self.images / self.seconds:.1f} images a second.")
        if self.missing:
            lines.append(f"Left to other machines: {len(self.missing)} of the shards, {self.missing[0]} the first.")
        return "\n".join(lines)


@dataclass
class Shard:
    """One Parquet file of `folder`, `number` of `count`, made of the source's rows `source`."""

    folder: Path
    number: int
    count: int
    source: range

    @property
    def name(self) -> str:
        return f"train-{self.number:05d}-of-{self.count:05d}"

    @property
    def path(self) -> Path:
        return self.folder / "data" / f"{self.name}.parquet"

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest" / f"{self.name}.json"

    def manifest(self) -> dict[str, Any]:
        """Its `file`, `source_rows` (first, and one after the last), `rows`, `bytes`, `sha256` and `skipped` rows."""
        return json.loads(self.manifest_path.read_text())

    def problem(self, verify: bool = True) -> str | None:
        """What is wrong with it, if anything; without `verify`, its content is not read."""
        try:
            manifest = self.manifest()
            size = self.path.stat().st_size
            if size != manifest["bytes"]:
                return f"{self.path.name} has {size} bytes instead of {manifest['bytes']}"
            if verify and sha256_of(self.path) != manifest["sha256"]:
                return f"{self.path.name} is damaged: its SHA-256 is not that of its manifest"
        except FileNotFoundError:
            return f"{self.path.name} is missing"
        except (ValueError, KeyError):
            return f"{self.manifest_path.name}, the manifest of {self.path.name}, is damaged"
        return None

    def write(self, made: Iterable[dict[str, Any] | Skipped], features: datasets.Features):
        """Writes the file and its manifest of what the rows of `source` were made into."""
        for path in (self.path, self.manifest_path):
            path.parent.mkdir(exist_ok=True)
        rows, skipped = 0, []
        kept = _without_skipped(zip(self.source, made, strict=True), skipped)
        with replacing(self.path) as temporary:
            with pyarrow.parquet.ParquetWriter(temporary, features.arrow_schema, compression="zstd") as writer:
                while group := list(itertools.islice(kept, ROWS_PER_GROUP)):
                    encoded = [features.encode_example(row) for row in group]
                    # Images that are files elsewhere move into the shard.
                    writer.write_table(
                        embed_table_storage(pyarrow.Table.from_pylist(encoded, schema=features.arrow_schema))
                    )
                    rows += len(group)
            manifest = {
                "file": self.path.name,
                "source_rows": [self.source.start, self.source.stop],
                "rows": rows,
                "bytes": temporary.stat().st_size,
                "sha256": sha256_of(temporary),
                "skipped": skipped,
            }
        write_json(self.manifest_path, manifest)


def write_shards(
    folder: str | Path,
    num_rows: int,
    make_rows: RowMaker,
    features: datasets.Features,
    record_name: str,
    settings: dict[str, Any],
    rows_per_shard: int = 10_000,
    part: Part | None = None,
    progress: bool = True,
) -> ShardsReport:
    """
    Writes a dataset of one new row, at most, for each row of a source; goes on where it was interrupted.

    Args:
        folder: New, empty, or holding a part of the same dataset.
        num_rows: Rows of the source.
        make_rows: Called once for each shard that is not there yet, with its rows' numbers.
        features: Columns of the new rows. Images that are files are copied into the shards.
        record_name: File in `folder` that receives `settings`, `num_rows` and `rows_per_shard`.
        settings: All, in JSON's types, that decides what the new rows are.
        part: Which of the shards are this machine's, by default all of them.
        progress: Show a progress bar.

    Raises:
        ValueError: The folder holds something else or was made with other settings, numbers are out of range, or
            none of the rows can be used.
    """
    folder, part = Path(folder), part or Part()
    shards = _shards(folder, num_rows, rows_per_shard)
    _claim(folder, record_name, {**settings, "num_rows": num_rows, "rows_per_shard": rows_per_shard})
    own = shards[part.index :: part.count]
    report = ShardsReport()
    total = sum(len(shard.source) for shard in own)
    with tqdm(total=total, unit=" rows", desc="Writing shards", disable=not progress) as bar:
        for shard in own:
            if shard.problem():
                start = time.monotonic()
                shard.write(_counted(make_rows(shard.source), bar), features)
                report.seconds += time.monotonic() - start
                report.read += len(shard.source)
            else:
                bar.update(len(shard.source))
            manifest = shard.manifest()
            report.rows += manifest["rows"]
            report.skipped += manifest["skipped"]
    report.missing = [shard.name for shard in shards if not shard.manifest_path.is_file()]
    if not report.rows and part.count == 1:
        first = report.skipped[0]
        raise ValueError(f"None of the {num_rows} rows can be used; the first, {first['name']}: {first['reason']}")
    return report


def require_shards(folder: str | Path, record_name: str, verify: bool = False) -> dict[str, Any]:
    """The record of a dataset that [`write_shards`] finished.

    Args:
        verify: Also compare every file's SHA-256 with its manifest's.

    Raises:
        ValueError: The record is damaged, or shards are missing or damaged; they are named.
    """
    folder = Path(folder)
    record = read_record(folder, record_name)
    shards = _shards(folder, record["num_rows"], record["rows_per_shard"])
    problems = [problem for shard in shards if (problem := shard.problem(verify))]
    if problems:
        more = f", and {len(problems) - PROBLEMS_SHOWN} more like these" if len(problems) > PROBLEMS_SHOWN else ""
        raise ValueError(
            f"'{folder}' is incomplete: {'; '.join(problems[:PROBLEMS_SHOWN])}{more}. Run the command that made it "
            "again (on every machine that took part): it writes what is missing or damaged."
        )
    return record


def read_record(folder: str | Path, record_name: str) -> dict[str, Any]:
    """What the folder was made of and with which settings, whole or not.

    Raises:
        ValueError: It is no JSON, or holds something else.
    """
    path = Path(folder) / record_name
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON ({error}); make the dataset again in another folder.") from error
    if not isinstance(record, dict) or not {"num_rows", "rows_per_shard"} <= record.keys():
        raise ValueError(f"'{path}' is no record of a dataset that was made here; choose another folder.")
    return record


def _shards(folder: Path, num_rows: int, rows_per_shard: int) -> list[Shard]:
    if num_rows < 1 or rows_per_shard < 1:
        raise ValueError(f"There are {num_rows} rows, {rows_per_shard} to a shard; expected at least 1 of both.")
    count = math.ceil(num_rows / rows_per_shard)
    if count > MAX_SHARDS:
        raise ValueError(
            f"{num_rows} rows in shards of {rows_per_shard} make {count} shards, more than {MAX_SHARDS}; put more "
            "rows into a shard."
        )
    starts = range(0, num_rows, rows_per_shard)
    return [
        Shard(folder, number, count, range(start, min(start + rows_per_shard, num_rows)))
        for number, start in enumerate(starts)
    ]


def _claim(folder: Path, record_name: str, record: dict[str, Any]):
    """Makes the folder and its record, or finds that they are there already."""
    record = json.loads(json.dumps(record))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; expected a folder to write into.")
    if (folder / record_name).is_file():
        found = read_record(folder, record_name)
        differing = [name for name in {**found, **record} if found.get(name) != record.get(name)]
        if differing:
            told = "; ".join(f"{name} was {found.get(name)!r} and is {record.get(name)!r}" for name in differing)
            raise ValueError(
                f"'{folder}' was begun with other settings ({told}); give the same ones, or choose another folder."
            )
        return
    if folder.is_dir():
        # Another machine may be about to write the record.
        others = [path.name for path in folder.iterdir() if not path.name.startswith(f".{record_name}.")]
        if others and not (folder / record_name).is_file():
            raise ValueError(
                f"'{folder}' holds something else (for instance {min(others)}); choose an empty or new folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / record_name, record)


def _without_skipped(
    made: Iterable[tuple[int, dict[str, Any] | Skipped]], skipped: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    for number, row in made:
        if isinstance(row, Skipped):
            skipped.append({"row": number, "name": row.name, "reason": row.reason})
        else:
            yield row


def _counted(made: Iterable[Any], bar: tqdm) -> Iterator[Any]:
    for item in made:
        yield item
        bar.update()


__all__ = ["Part", "Shard", "ShardsReport", "Skipped", "read_record", "require_shards", "write_shards"]
