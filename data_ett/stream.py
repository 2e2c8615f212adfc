"""Examples that are read while training goes on, without an end, split among processes and their workers.

- A *reader* is one worker of one process. In each epoch the shards are put in another order; each reader has its own
  shards, and of those that are left over, which every reader opens, its own rows.
- A reader takes rows in blocks and mixes each block. Where it stands is therefore a few numbers, and it can go on
  there to the last bit: nothing that was mixed but not yet used is lost.
- A shard that breaks off is left where it does, named and counted.
"""

import itertools
import logging
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import datasets
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .preparation import MOST_UNUSABLE, PreparedDataset
from .rows import UNUSABLE, RowReader
from .selection import FilterChain, summarize
from .skipped import SkippedRows, missing_data
from .sources import SceneExamples
from .tars import index_tar, read_samples

logger = logging.getLogger(__name__)

Position = dict[str, Any]
"""Where a reader stands, as JSON can hold it."""

Place = tuple[tuple[int, int], str, dict[str, Any]]
"""A row with its place (which of a reader's shards, which row in it) and its name."""

ROWS_AT_ONCE = 32
MAX_SHARDS = 4096
"""More shards than that are read in groups: finding one among them takes time in proportion to their number."""


class Shards(Protocol):
    """Rows in parts that can be read apart."""

    def __len__(self) -> int: ...

    def name(self, shard: int) -> str: ...

    def read(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        """The shard's rows from number `start` on."""


class DatasetShards:
    """Shards of a dataset of datasets."""

    def __init__(self, rows: datasets.IterableDataset, path: str):
        self.rows, self.path = rows, path

    def __len__(self) -> int:
        return min(self.rows.num_shards, MAX_SHARDS)

    def name(self, shard: int) -> str:
        return f"shard {shard} of {self.path}"

    def read(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        # Row by row, datasets would split it among the workers a second time.
        batches = self.rows.shard(len(self), shard).iter(ROWS_AT_ONCE)
        rows = (
            dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
        )
        return itertools.islice(rows, start, None)


class TarShards:
    """Tar files of a webdataset."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, shard: int) -> str:
        return self.paths[shard]

    def read(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        samples, damage = index_tar(self.paths[shard])
        yield from read_samples(self.paths[shard], samples[start:])
        if damage:
            raise OSError(damage)


class SceneShards:
    """Scenes by their numbers, for a stream in which they are mixed with other data."""

    SIZE = 256

    def __init__(self, examples: SceneExamples):
        self.examples = examples

    def __len__(self) -> int:
        return -(-len(self.examples) // self.SIZE)

    def name(self, shard: int) -> str:
        return f"scenes from {shard * self.SIZE} on"

    def read(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        first = shard * self.SIZE
        for index in range(first + start, min(first + self.SIZE, len(self.examples))):
            yield {"index": index}


class SceneReader:
    """Makes examples of the rows of [`SceneShards`]."""

    def __init__(self, examples: SceneExamples):
        self.examples = examples

    def name(self, row: dict[str, Any], number: int | str) -> str:
        return f"scene {row['index']}"

    def __call__(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        return self.examples[row["index"]]


class ExampleStream:
    """Examples of one source, without an end.

    Args:
        shards ([`Shards`]), reader ([`RowReader`]): The rows, and what makes examples of them.
        block_rows (`int`): Rows that are mixed with one another; so many undecoded ones are held in memory.
        filters ([`FilterChain`], *optional*): Each reader has its own: what looks like an image that only another
            reader or another epoch has shown is no near duplicate.
    """

    def __init__(
        self,
        shards: Shards,
        reader: RowReader | SceneReader,
        seed: int,
        block_rows: int = 1000,
        filters: FilterChain | None = None,
    ):
        self.shards, self.reader, self.seed, self.block_rows = shards, reader, seed, block_rows
        self.filters = filters or FilterChain([])
        self._skipped = SkippedRows()

    @property
    def num_shards(self) -> int:
        """In how many parts the data are read."""
        return len(self.shards)

    def read(
        self, reader: int, readers: int, position: Position | None = None
    ) -> Iterator[tuple[dict[str, Any], Position]]:
        """The examples of one of several readers from `position` on, and with each where the reader stands after it.

        Raises:
            ValueError: An epoch held no usable example for this reader.
            MissingDataError: A shard is missing that was there when the data were opened.
        """
        self._skipped = SkippedRows()
        position = position or _start(0)
        self.filters.load_state_dict(position.get("filters"))
        while True:
            is_whole, is_empty = position == _start(position["epoch"]), True
            for example, after in self._epoch(reader, readers, position):
                is_empty = False
                yield example, after
            if is_whole and is_empty:
                first = next((f"{name}: {reason}" for name, reason in self._skipped.reasons.items()), None)
                first = first or summarize(self.filters.report()) or "too few rows"
                raise ValueError(
                    f"Reader {reader + 1} of {readers} has no usable example in a whole epoch of {len(self.shards)} "
                    f"shards, of which one is {self.shards.name(0)} ({first}). Give more data, or fewer "
                    "training.dataloader_num_workers."
                )
            position = _start(position["epoch"] + 1)
            self.filters.forget()

    def first(self, count: int) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
        """Names and examples of the first rows, with the error in the place of a row that cannot be used. There are
        none where filters choose among the rows."""
        shards = range(0 if self.filters.steps else len(self.shards))
        rows = itertools.chain.from_iterable(self.shards.read(shard, 0) for shard in shards)
        try:
            for number, row in enumerate(itertools.islice(rows, count)):
                name = self.reader.name(row, number)
                try:
                    yield name, self.reader(row, name)
                except UNUSABLE as error:
                    yield name, error
        except Exception as error:  # Readers of damaged files raise almost any type.
            logger.debug("The first rows of %s break off: %s", self.shards.name(0), error)

    def take_skipped(self) -> dict[str, str]:
        """As [`SkippedRows.take`], of the reading that was begun last."""
        return self._skipped.take()

    def _epoch(self, reader: int, readers: int, position: Position) -> Iterator[tuple[dict[str, Any], Position]]:
        rows = self._rows(reader, readers, position)
        here = dict(position)
        while block := list(itertools.islice(rows, self.block_rows)):
            rng = np.random.default_rng((self.seed, here["epoch"], reader, here["block"]))
            kept = self._filter(block, here)
            order = rng.permutation(len(kept))
            for offset in range(here["offset"], len(kept)):
                _, name, row = kept[order[offset]]
                try:
                    example = self.reader(row, name)
                except UNUSABLE as error:
                    self._skipped.note(name, str(error))
                    continue
                yield example, {**here, "offset": offset + 1}
            (shard, number), _, _ = block[-1]
            here |= {"shard": shard, "row": number + 1, "block": here["block"] + 1, "offset": 0}

    def _filter(self, block: list[Place], here: Position) -> list[Place]:
        """What passes the filters, whose state before the block and counts after it become part of the position."""
        if not self.filters.steps:
            return block
        here["filters"] = self.filters.state_dict()
        kept = self.filters.keep([self.reader.view(row) for _, _, row in block])
        here["counts"] = [self.filters.seen[:], self.filters.removed[:]]
        return list(itertools.compress(block, kept))

    def _rows(self, reader: int, readers: int, position: Position) -> Iterator[Place]:
        """What is left of an epoch: each row with its place (which of the reader's shards, which row) and its name."""
        shards = np.random.default_rng((self.seed, position["epoch"])).permutation(len(self.shards)).tolist()
        whole = len(shards) - len(shards) % readers
        own = [(shard, 0, 1) for shard in shards[:whole][reader::readers]]
        own += [(shard, (reader + place) % readers, readers) for place, shard in enumerate(shards[whole:])]
        start = position["row"]
        for place, (shard, first, step) in enumerate(own[position["shard"] :], position["shard"]):
            try:
                for number, row in enumerate(self.shards.read(shard, start), start):
                    if number % step == first:
                        yield (place, number), self.reader.name(row, f"{number} of {self.shards.name(shard)}"), row
            except FileNotFoundError as error:
                raise missing_data(error.filename or self.shards.name(shard)) from error
            except Exception as error:  # Readers of damaged files raise almost any type.
                self._skipped.note(self.shards.name(shard), f"Only its beginning can be read: {error}")
            start = 0

    def filters_report(self, positions: list[Position | None] = ()) -> list[dict[str, Any]]:
        """As [`FilterChain.report`], of all readers, of which it is given where they stand."""
        counts = [position["counts"] for position in positions if position and "counts" in position]
        return self.filters.report(counts)

    def texts(self) -> list[str]:
        """Raises `ValueError`: a word-level tokenizer has to know every text beforehand."""
        raise ValueError(
            "A new language model takes its vocabulary from all captions, which streamed data show one by one; set "
            "data.streaming=false, or give model.language_model with a tokenizer of its own."
        )


def _start(epoch: int) -> Position:
    return {"epoch": epoch, "shard": 0, "row": 0, "block": 0, "offset": 0}


class MixedStream:
    """Examples of several streams; which one the next example is from is drawn by weight, from the seed, the reader
    and the draw's number alone."""

    def __init__(self, sources: dict[str, ExampleStream], weights: dict[str, float], seed: int = 0):
        self.sources, self.seed = sources, seed
        self.weights = np.asarray([weights[name] for name in sources], dtype=float)
        self.weights /= self.weights.sum()

    @property
    def num_shards(self) -> int:
        """As [`ExampleStream.num_shards`], of all sources together."""
        return sum(source.num_shards for source in self.sources.values())

    def filters_report(self, positions: list[Position | None] = ()) -> list[dict[str, Any]]:
        """As [`ExampleStream.filters_report`], of all sources, with the name of each."""
        return [
            {"source": name, **one}
            for name, source in self.sources.items()
            for one in source.filters_report([position["sources"][name] for position in positions if position])
        ]

    def texts(self) -> list[str]:
        """As [`ExampleStream.texts`]."""
        return [text for source in self.sources.values() for text in source.texts()]

    def take_skipped(self) -> dict[str, str]:
        """As [`ExampleStream.take_skipped`], of all sources."""
        return {
            f"{name}: {row}": reason
            for name, source in self.sources.items()
            for row, reason in source.take_skipped().items()
        }

    def read(
        self, reader: int, readers: int, position: Position | None = None
    ) -> Iterator[tuple[dict[str, Any], Position]]:
        """As [`ExampleStream.read`]."""
        places = dict(position["sources"]) if position else dict.fromkeys(self.sources)
        streams = {name: source.read(reader, readers, places[name]) for name, source in self.sources.items()}
        names = list(streams)
        for draw in itertools.count(position["draw"] if position else 0):
            rng = np.random.default_rng((self.seed, reader, draw))
            name = names[rng.choice(len(names), p=self.weights)]
            example, places[name] = next(streams[name])
            yield {**example, "name": f"{name}: {example['name']}"}, {"draw": draw + 1, "sources": dict(places)}


class PreparedStream(IterableDataset):
    """A stream's examples as the collator takes them. Each item also has the reader's `position` after it and what
    was `skipped` before it.

    An example that cannot be prepared, for instance because it is too long, is skipped, too.

    Args:
        examples ([`ExampleStream`] or [`MixedStream`])
        preparation ([`PreparedDataset`]): Makes numbers of them.
    """

    def __init__(self, examples: ExampleStream | MixedStream, preparation: PreparedDataset):
        self.examples, self.preparation = examples, preparation
        self.share(0, 1)

    def share(self, rank: int, world_size: int, positions: list[Position | None] | None = None, turn: int = 0):
        """
        Which readers this process has, for as many workers as there are `positions`.

        Args:
            rank, world_size (`int`): The process's number, and how many there are.
            positions: Where its readers stand; those of `None` at the beginning.
            turn (`int`): Which of them gives the next batch.
        """
        self.rank, self.world_size, self.positions, self.turn = rank, world_size, positions or [None], turn

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = get_worker_info(), len(self.positions)
        own = ((worker.id if worker else 0) + self.turn) % workers
        reader, readers = self.rank * workers + own, self.world_size * workers
        skipped, unusable = SkippedRows(), 0
        for example, position in self.examples.read(reader, readers, self.positions[own]):
            try:
                item = self.preparation.prepare(example, zlib.crc32(example["name"].encode()))
            except ValueError as error:
                skipped.note(example["name"], str(error))
                unusable += 1
                if unusable == MOST_UNUSABLE:
                    raise ValueError(
                        f"{MOST_UNUSABLE} examples in a row cannot be used; the last, {example['name']}: {error}"
                    ) from error
                continue
            yield {**item, "position": position, "skipped": self.examples.take_skipped() | skipped.take()}
            unusable = 0


__all__ = [
    "DatasetShards",
    "ExampleStream",
    "MixedStream",
    "Position",
    "PreparedStream",
    "SceneReader",
    "SceneShards",
    "TarShards",
]
