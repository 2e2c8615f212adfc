"""The trainer's part that ends a run well: at a signal with a checkpoint, at a loss that is no number without one."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import distributed, nn
from transformers import TrainerCallback

from ett.common_ett.files import replacing

from .checkpoints import CheckpointingTrainer, newest_checkpoint
from .finite import NonFiniteLossError, StepWatch, describe_findings, gradients_of, is_finite
from .interruption import Interruption, shield_workers


class SafeTrainer(CheckpointingTrainer):
    """
    Attributes:
        interrupted_by (`int`): Number of the signal that ended training early, or 0. All processes have the same.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interrupted_by = 0
        self._interruption = Interruption()
        self._watch = StepWatch()
        self.add_callback(_InterruptionCallback(self))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The model's parameters by part."""
        raise NotImplementedError

    def gradients(self) -> dict[str, list[torch.Tensor]]:
        """A step's gradients by part, before the optimizer uses them; where they are shared out among processes, this
        one's shares."""
        raise NotImplementedError

    def train(self, *args, **kwargs):
        self.interrupted_by = 0
        with self._interruption:
            return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        shield_workers(loader)
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What is in a batch for reports alone does not reach the model."""
        inputs = dict(inputs)
        names = inputs.pop("names", [])
        if self.model.training:
            self._watch.begin(names)
        return super()._prepare_inputs(inputs)

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """
        Raises:
            NonFiniteLossError: A weight is NaN or infinite: the last checkpoint stays the last.
        """
        parts = self.parts() | self._adversary_parts()
        if self.average is not None:
            parts["average"] = list(self.average.weights.values())
        broken = [not is_finite(parameters) for parameters in parts.values()]
        flags = self._anywhere(torch.tensor(broken, dtype=torch.int, device=self.args.device))
        if any(flags):
            names = ", ".join(name for name, flag in zip(parts, flags, strict=True) if flag)
            raise NonFiniteLossError(
                f"After step {self.state.global_step}, weights of {names} are not finite; no checkpoint of them is "
                f"written, and {self._last_checkpoint()}."
            )
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        # An interrupted run is not at its end, of which the summary would be.
        if not (self.interrupted_by and "train_runtime" in logs):
            super().log(logs, *args, **kwargs)

    def _adversary_parts(self) -> dict[str, list[nn.Parameter]]:
        return {} if self.adversary is None else {"discriminator": list(self.adversary.discriminator.parameters())}

    def _anywhere(self, flags: torch.Tensor) -> list[int]:
        """The largest value of each flag among all processes."""
        if self.args.world_size > 1:
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return flags.tolist()

    def _last_checkpoint(self) -> str:
        last = newest_checkpoint(self.args.output_dir)
        return f"the last checkpoint is {last.name}" if last else "there is no checkpoint yet"

    def _check_step(self):
        """Between a step's gradients and the optimizers: the one moment at which all processes agree whether they are
        finite and whether a signal came. The host waits for the device once.

        Raises:
            NonFiniteLossError: A loss or a gradient, in any process, is NaN or infinite. Gradients that overflow in
                float16 are left to the scaler, which leaves out the step.
        """
        gradients = {part: gradients_of(parameters) for part, parameters in self._adversary_parts().items()}
        if self.accelerator.scaler is None:
            gradients |= self.gradients()
        broken = self._watch.is_broken([gradient for part in gradients.values() for gradient in part])
        flags = torch.stack([broken.int(), torch.full_like(broken, self._interruption.received, dtype=torch.int)])
        is_broken, self.interrupted_by = self._anywhere(flags)
        if is_broken:
            self._stop_at_non_finite(gradients)
        self._watch.clear()

    def _stop_at_non_finite(self, gradients: dict[str, list[torch.Tensor]]):
        step = self.state.global_step + 1
        findings = gather_object([{"process": self.args.process_index, **self._watch.findings(gradients)}])
        path = Path(self.args.output_dir) / f"non-finite-step-{step}.json"
        if self.args.should_save:
            report = {"step": step, "processes": findings}
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(report, indent=2))
        raise NonFiniteLossError(
            f"{describe_findings(step, findings)} Training stopped before this step changed the model; "
            f"{self._last_checkpoint()}. All that was found is in '{path}'."
        )


class _InterruptionCallback(TrainerCallback):
    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.interrupted_by:
            control.should_save = control.should_training_stop = True


__all__ = ["SafeTrainer"]
