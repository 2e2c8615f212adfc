"""Figures since the last log. Checkpoints keep them, since a run may be interrupted between two logs."""

from collections import defaultdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback


class Unlogged(TrainerCallback):
    """Losses and uses of codes since the last log. A resumed run starts with those of its checkpoint, so that it logs
    the means of an uninterrupted run.

    Args:
        trainer ([`ETTTrainer`])
        num_codes (`int`): Size of the codebook.

    Attributes:
        values (`dict[str, list[torch.Tensor]]`): Figures by name, each value of shape `()`.
        code_counts (`torch.Tensor` of shape `(num_codes,)`): How often each code was used.
        checkpoint (`str`, *optional*): Folder of the checkpoint that the run resumes from.
    """

    def __init__(self, trainer: Trainer, num_codes: int):
        self.trainer = trainer
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.code_counts = torch.zeros(num_codes, dtype=torch.long, device=trainer.args.device)
        self.checkpoint: str | None = None

    def save(self, folder: str | Path):
        """Writes the figures of this process."""
        state = {
            "loss": self.trainer._tr_loss,
            "last_step": self.trainer._globalstep_last_logged,
            "values": {name: torch.stack(values) for name, values in self.values.items()},
            "code_counts": self.code_counts,
        }
        torch.save(state, self._path(folder))

    def on_train_begin(self, args, state, control, **kwargs):
        # Transformers sets its own sums to 0 after the checkpoint is loaded and before this call.
        if self.checkpoint is None or not self._path(self.checkpoint).is_file():
            return
        saved = torch.load(self._path(self.checkpoint), weights_only=True, map_location=args.device)
        self.trainer._tr_loss += saved["loss"]
        # The mean at the end, train_loss, is that of this call's steps alone.
        self.trainer._total_loss_scalar -= saved["loss"].item()
        self.trainer._globalstep_last_logged = saved["last_step"]
        for name, values in saved["values"].items():
            self.values[name] += values.unbind()
        self.code_counts += saved["code_counts"]

    def _path(self, folder: str | Path) -> Path:
        return Path(folder) / f"unlogged-{self.trainer.args.process_index}.pt"


__all__ = ["Unlogged"]
