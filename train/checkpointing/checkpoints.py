"""Checkpoints that are there in whole or not at all.

- A checkpoint is written under a hidden folder, flushed to the disk and then renamed, so that `checkpoint-N` is
  complete whenever the process is killed. Old ones are renamed back into the hidden folder before they are deleted.
- Its list of files with their sizes tells a torn copy.
- It holds everything: weights (beside an adapter those that train), optimizers, schedules, averages, discriminator,
  scaler, random states and position.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments import ETTTrainingArguments

logger = logging.getLogger(__name__)

FILE_LIST_NAME = "files.json"
UNFINISHED_NAME = ".unfinished"
GIB = 2**30


class CheckpointError(OSError):
    """A checkpoint or the finished model could not be written; the checkpoints before are whole."""


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's folder. One that lacks a file, or part of one, is passed over with a
    warning."""
    for checkpoint in reversed(_checkpoints(folder).values()):
        problem = _incompleteness(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("'%s' is passed over, since it is not complete: %s.", checkpoint, problem)
    return None


def _checkpoints(folder: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder by their steps, in ascending order."""
    paths = {
        int(match[1]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    return dict(sorted(paths.items()))


def _incompleteness(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, or None."""
    try:
        sizes = json.loads((checkpoint / FILE_LIST_NAME).read_text())
    except (OSError, ValueError):
        return f"its list of files, {FILE_LIST_NAME}, is missing or torn"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def _publish(written: Path, checkpoint: Path):
    """Gives a written folder its name, once all of it is on the disk."""
    sizes = {path.relative_to(written).as_posix(): path.stat().st_size for path in _files(written)}
    (written / FILE_LIST_NAME).write_text(json.dumps(sizes, indent=2))
    for path in (*written.rglob("*"), written):
        _flush(path)
    if checkpoint.exists():
        _discard(checkpoint)
    os.rename(written, checkpoint)
    _flush(checkpoint.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(checkpoint: Path):
    """Deletes a checkpoint that is never seen half deleted."""
    hidden = checkpoint.parent / UNFINISHED_NAME / f"{checkpoint.name}.old"
    hidden.parent.mkdir(exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _rotate(newest: Path, limit: int | None, best: str | None):
    """Deletes what is older than the newest checkpoints, up to `limit` with the best among them; and those of later
    steps, which are torn, or of a run that was begun anew."""
    checkpoints = list(_checkpoints(newest.parent).values())
    later = [checkpoint for checkpoint in checkpoints[checkpoints.index(newest) + 1 :] if str(checkpoint) != best]
    for checkpoint in (*_surplus(newest, limit, best), *later):
        _discard(checkpoint)


def _surplus(newest: Path, limit: int | None, best: str | None) -> list[Path]:
    """The checkpoints before the newest that are not among the newest `limit`, to which the best belongs."""
    checkpoints = list(_checkpoints(newest.parent).values())
    kept = {newest} if best is None else {newest, Path(best)}
    older = checkpoints[: checkpoints.index(newest)]
    for checkpoint in reversed(older):
        if limit is None or limit <= 0 or len(kept) < limit:
            kept.add(checkpoint)
    return [checkpoint for checkpoint in older if checkpoint not in kept]


class CheckpointFolder:
    """The checkpoints of a run, of which [`newest_checkpoint`] finds the last, wherever the run was interrupted.

    Args:
        args ([`ETTTrainingArguments`]): The trainer's own, whose `output_dir` is the run's folder.
        wait ([`Callable`]): Waits until all processes have called it.
    """

    def __init__(self, args: ETTTrainingArguments, wait: Callable[[], None]):
        self.args, self.wait = args, wait
        self._last_saved: Path | None = None

    @property
    def run(self) -> Path:
        return Path(self.args.output_dir)

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is the last that was written here."""
        return self._last_saved == self._path(step)

    @contextmanager
    def writing(self, state: TrainerState) -> Iterator[Path]:
        """Gives the folder in which transformers writes the checkpoint of the present step, and publishes it then.

        Raises:
            CheckpointError: It could not be written; what was begun is gone.
        """
        run, checkpoint = self.run, self._path(state.global_step)
        written = run / UNFINISHED_NAME / checkpoint.name
        try:
            self.args.output_dir = str(written.parent)
            try:
                yield written
            finally:
                self.args.output_dir = str(run)
            if state.best_model_checkpoint == str(written):
                state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    state.save_to_json(str(written / TRAINER_STATE_NAME))
            # Every process has written its part.
            self.wait()
            if self.args.should_save:
                _publish(written, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            message = self.describe_failure(written, error)
            shutil.rmtree(written.parent, ignore_errors=True)
            raise CheckpointError(message) from error
        self._last_saved = checkpoint
        if self.args.should_save:
            _rotate(checkpoint, self.args.save_total_limit, state.best_model_checkpoint)
            shutil.rmtree(written.parent, ignore_errors=True)
            self._warn_of_a_full_disk(checkpoint)
        # None goes on, or ends and is missed by its launcher, before the checkpoint has its name.
        self.wait()

    def clear(self, resumed_from: str | None, state: TrainerState):
        """Deletes what an interrupted save left: its folder, and checkpoints that were to give way to the last."""
        if resumed_from is not None and Path(resumed_from).parent == self.run:
            for old in _surplus(Path(resumed_from), self.args.save_total_limit, state.best_model_checkpoint):
                _discard(old)
        shutil.rmtree(self.run / UNFINISHED_NAME, ignore_errors=True)

    def describe_failure(self, written: Path, error: Exception) -> str:
        """Why a folder could not be written, and what is left to go on from."""
        files = sorted(_files(written), key=lambda path: path.stat().st_mtime_ns)
        free = shutil.disk_usage(self.run).free / GIB
        whole = newest_checkpoint(self.run)
        begun = f" (the last file begun is {files[-1].name})" if files else ""
        return (
            f"{written.name} could not be written{begun}: {error}. '{self.run}' has {free:.2f} GiB free. "
            + (f"{whole.name} is whole" if whole else "There is no earlier checkpoint")
            + "; make room and run again to go on."
        )

    def _path(self, step: int) -> Path:
        return self.run / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _warn_of_a_full_disk(self, checkpoint: Path):
        needed = sum(path.stat().st_size for path in _files(checkpoint))
        free = shutil.disk_usage(checkpoint).free
        if free < needed:
            logger.warning(
                "'%s' has %.2f GiB free, and a checkpoint takes %.2f GiB: the next one will not fit.",
                checkpoint.parent,
                free / GIB,
                needed / GIB,
            )


__all__ = ["CheckpointError", "CheckpointFolder", "newest_checkpoint"]
