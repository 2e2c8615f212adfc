"""What ends a run well: at a signal with a checkpoint, at a loss that is no number without one."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import distributed
from transformers import TrainerCallback

from ett.common_ett.files import write_json

from ..arguments import ETTTrainingArguments
from .checkpoints import newest_checkpoint
from .finite import NonFiniteLossError, StepWatch, describe_findings, is_finite
from .interruption import Interruption


class StepGuard(TrainerCallback):
    """Looks at every step before the optimizer takes it, and stops training at a signal.

    Args:
        args ([`ETTTrainingArguments`])

    Attributes:
        watch ([`StepWatch`]): What this process has seen of the present step.
        interruption ([`Interruption`]): Within it, training runs.
        interrupted_by (`int`): Number of the signal that ended training early, or 0. All processes have the same.
    """

    def __init__(self, args: ETTTrainingArguments):
        self.args = args
        self.watch = StepWatch()
        self.interruption = Interruption()
        self.interrupted_by = 0

    def check_step(self, step: int, gradients: dict[str, list[torch.Tensor]]):
        """Between a step's gradients and the optimizers: the one moment at which all processes agree whether they are
        finite and whether a signal came. The host waits for the device once.

        Args:
            step: Number of the step, counted from 1.
            gradients: Those to look at, by part; where they are shared out among processes, this one's shares.

        Raises:
            NonFiniteLossError: A loss or a gradient, in any process, is NaN or infinite.
        """
        broken = self.watch.is_broken([gradient for part in gradients.values() for gradient in part])
        flags = torch.stack([broken.int(), torch.full_like(broken, self.interruption.received, dtype=torch.int)])
        is_broken, self.interrupted_by = self._anywhere(flags)
        if is_broken:
            self._stop(step, gradients)
        self.watch.clear()

    def check_weights(self, step: int, parts: dict[str, list[torch.Tensor]]):
        """
        Raises:
            NonFiniteLossError: A weight, in any process, is NaN or infinite: the last checkpoint stays the last.
        """
        broken = [not is_finite(weights) for weights in parts.values()]
        flags = self._anywhere(torch.tensor(broken, dtype=torch.int, device=self.args.device))
        if any(flags):
            names = ", ".join(name for name, flag in zip(parts, flags, strict=True) if flag)
            raise NonFiniteLossError(
                f"After step {step}, weights of {names} are not finite; no checkpoint of them is written, and "
                f"{self._last_checkpoint()}."
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted_by:
            control.should_save = control.should_training_stop = True

    def _anywhere(self, flags: torch.Tensor) -> list[int]:
        """The largest value of each flag among all processes."""
        if self.args.world_size > 1:
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return flags.tolist()

    def _stop(self, step: int, gradients: dict[str, list[torch.Tensor]]):
        findings: list[dict[str, Any]] = gather_object(
            [{"process": self.args.process_index, **self.watch.findings(gradients)}]
        )
        path = Path(self.args.output_dir) / f"non-finite-step-{step}.json"
        if self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"step": step, "processes": findings})
        raise NonFiniteLossError(
            f"{describe_findings(step, findings)} Training stopped before this step changed the model; "
            f"{self._last_checkpoint()}. All that was found is in '{path}'."
        )

    def _last_checkpoint(self) -> str:
        last = newest_checkpoint(self.args.output_dir)
        return f"the last checkpoint is {last.name}" if last else "there is no checkpoint yet"


__all__ = ["StepGuard"]
