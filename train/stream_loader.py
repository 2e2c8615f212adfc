"""Training on a stream: its batches, and a file in each checkpoint that says where its readers stand."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from ett.common_ett.files import write_json
from ett.data_ett.stream import Position, PreparedStream


@dataclass
class ReportingCollator:
    """A batch by `collator`, with the last item's `position`, where it has one, and all that its items `skipped`."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        skipped = {name: reason for item in items for name, reason in item.get("skipped", {}).items()}
        batch = {**self.collator(items), "skipped": skipped}
        return {**batch, "position": items[-1]["position"]} if "position" in items[-1] else batch


class StreamLoader:
    """One process's batches of a stream, without an end. Each worker reads its own part of the data and gives a whole
    batch in its turn.

    Unlike a loader that accelerate prepares, it shares the data out by itself, fetches no batch before it is asked for
    one, and goes on where a checkpoint was written without reading what came before.

    Args:
        rank, world_size (`int`): The process's number, and how many there are.
        num_workers (`int`): Of each process; 0 reads in the process itself.
        options: Of [`~torch.utils.data.DataLoader`].

    Attributes:
        skipped (`dict[str, str]`): Rows that were skipped on the way to the batches so far, by name, and why.
    """

    def __init__(
        self,
        stream: PreparedStream,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ):
        self.stream, self.rank, self.world_size = stream, rank, world_size
        self.positions: list[Position | None] = [None] * max(num_workers, 1)
        self.batches = 0
        self.skipped: dict[str, str] = {}
        self.loader = DataLoader(
            stream,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=ReportingCollator(collator),
            # Its own: a loader draws a number from it, which training's generator would lack after a resume.
            generator=torch.Generator(),
            **options,
        )

    @classmethod
    def of_run(cls, stream: PreparedStream, collator: Callable, batch_size: int, args: TrainingArguments):
        """One for this process of a run."""
        return cls(
            stream,
            collator,
            batch_size,
            args.dataloader_num_workers,
            args.process_index,
            args.world_size,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        readers = len(self.positions)
        self.stream.share(self.rank, self.world_size, list(self.positions), self.batches % readers)
        for batch in self.loader:
            self.positions[self.batches % readers] = batch.pop("position")
            self.skipped |= batch.pop("skipped")
            self.batches += 1
            yield batch

    def save(self, folder: str | Path):
        """Writes where this process's readers stand."""
        state = {"batches": self.batches, "positions": self.positions, "skipped": self.skipped}
        write_json(self._path(folder), {"world_size": self.world_size, **state})

    def load(self, folder: str | Path):
        """Goes on where a checkpoint was written.

        Raises:
            ValueError: It has no such file, or it is of another number of processes or workers.
        """
        path = self._path(folder)
        try:
            state = json.loads(path.read_text())
            world_size, workers = state["world_size"], len(state["positions"])
            self.batches, skipped = state["batches"], dict(state["skipped"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}', which says where the data go on, is missing or damaged; resume from an older checkpoint, "
                "or with as many processes as wrote this one."
            ) from error
        if (world_size, workers) != (self.world_size, len(self.positions)):
            raise ValueError(
                f"The checkpoint '{folder}' was written by {world_size} processes with {workers} readers each, among "
                f"whom its data are shared out, and this run has {self.world_size} with {len(self.positions)}; go on "
                f"with {world_size} processes and training.dataloader_num_workers={workers}."
            )
        self.positions, self.skipped = state["positions"], skipped

    def _path(self, folder: str | Path) -> Path:
        return Path(folder) / f"stream-{self.rank}.json"


class StreamProgressCallback(TrainerCallback):
    """A stream has no epochs to count: the trainer's is the share of its steps that are done."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


__all__ = ["ReportingCollator", "StreamLoader", "StreamProgressCallback"]
