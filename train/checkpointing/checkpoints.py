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
from pathlib import Path

from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments import ETTTrainingArguments
from ..average import MovingAverage
from ..models.adapters import has_adapter, load_weights, read_adapter, save_adapter
from ..objective.adversary import Adversary

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


class CheckpointingTrainer(Trainer):
    """The trainer's part that keeps a run: [`newest_checkpoint`] finds what it saved, wherever it was interrupted."""

    args: ETTTrainingArguments
    average: MovingAverage | None = None
    adversary: Adversary | None = None
    _is_saving = False
    _last_saved: Path | None = None

    # Saving

    def _get_output_dir(self, trial=None) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED_NAME) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if checkpoint == self._last_saved:
            return
        written = checkpoint.parent / UNFINISHED_NAME / checkpoint.name
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._correct_best_checkpoint(written, checkpoint)
            # Every process has written its part.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _publish(written, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            message = self.describe_failure(written, error)
            shutil.rmtree(written.parent, ignore_errors=True)
            raise CheckpointError(message) from error
        finally:
            self._is_saving = False
        self._last_saved = checkpoint
        if self.args.should_save:
            _rotate(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)
            shutil.rmtree(written.parent, ignore_errors=True)
            self._warn_of_a_full_disk(checkpoint)
        # None goes on, or ends and is missed by its launcher, before the checkpoint has its name.
        self.accelerator.wait_for_everyone()

    def _correct_best_checkpoint(self, written: Path, checkpoint: Path):
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def describe_failure(self, written: Path, error: Exception) -> str:
        """Why a folder could not be written, and what is left to go on from."""
        files = sorted(
            (path for path in written.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns
        )
        run = Path(self.args.output_dir)
        free = shutil.disk_usage(run).free / GIB
        whole = newest_checkpoint(run)
        begun = f" (the last file begun is {files[-1].name})" if files else ""
        return (
            f"{written.name} could not be written{begun}: {error}. '{run}' has {free:.2f} GiB free. "
            + (f"{whole.name} is whole" if whole else "There is no earlier checkpoint")
            + "; make room and run again to go on."
        )

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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None:
            self.average.save(output_dir, self.args.should_save)
        if self.adversary is not None and self.args.should_save:
            self.adversary.save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with_adapter = has_adapter(self.model)
        if not (with_adapter or isinstance(self.model, ModelMixin)):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            if with_adapter:
                save_adapter(self.model, output_dir, state_dict)
            else:
                self.model.save_pretrained(output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    # Going on

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_adapter(self.model) and not self.is_fsdp_enabled:
            load_weights(self.model, read_adapter(resume_from_checkpoint))
        elif isinstance(self.model, ModelMixin):
            self.model.load_state_dict(type(self.model).from_pretrained(resume_from_checkpoint).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        """Loads the weights of the best checkpoint, their moving average and their discriminator. Transformers looks
        for files that tokenizers and adapters do not have, and knows of no average."""
        best = self.state.best_model_checkpoint
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not is_sharded and (has_adapter(self.model) or isinstance(self.model, ModelMixin)):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()
        if self.average is not None:
            self.average.load(best)
        if self.adversary is not None:
            self.adversary.load_weights(best)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.args.should_save:
            self._clear(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.average is not None:
            self.average.start(self.model)
            if resume_from_checkpoint is not None:
                self.average.load(resume_from_checkpoint)
        return prepared

    def _clear(self, checkpoint: str | None):
        """Deletes what an interrupted save left: its folder, and checkpoints that were to give way to the last."""
        run = Path(self.args.output_dir)
        if checkpoint is not None and Path(checkpoint).parent == run:
            for old in _surplus(Path(checkpoint), self.args.save_total_limit, self.state.best_model_checkpoint):
                _discard(old)
        shutil.rmtree(run / UNFINISHED_NAME, ignore_errors=True)

    def _init_training_state(self, max_steps, *args, **kwargs) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        # A resumed run logs and saves as often as it is told now.
        self.state.compute_steps(self.args, max_steps)
        return position

    def _run_epoch(self, **kwargs) -> None:
        # From a run's last checkpoint, transformers would take one more step, and begin a stream's epochs for ever.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True


__all__ = [
    "CheckpointError",
    "CheckpointingTrainer",
    "newest_checkpoint",
]
