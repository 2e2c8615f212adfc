"""The moving average of the weights (EMA), which tokenizers are judged and published by."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from ett.common_ett.files import replacing

AVERAGE_NAME = "average.safetensors"


class MovingAverage(TrainerCallback):
    """The average of all weights that train, with a constant decay, moved after each step of the optimizer. Of weights
    in shards (FSDP2) every process averages its own.

    Args:
        decay (`float`): Between 0 and 1.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.parameters: dict[str, nn.Parameter] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def start(self, model: nn.Module):
        """Starts from the model's present weights, once the model is where it trains."""
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.weights = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, average in self.weights.items():
            average.lerp_(self.parameters[name], 1 - self.decay)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within it, the model has the average's weights, and the average the model's."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self):
        for name, average in self.weights.items():
            own = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(own)

    def save(self, folder: str | Path, is_writer: bool):
        """Writes the average in whole. All processes take part; one of them writes."""
        whole = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value)
            for name, value in self.weights.items()
        }
        if is_writer:
            with replacing(Path(folder) / AVERAGE_NAME) as temporary:
                safetensors.torch.save_file({name: value.contiguous() for name, value in whole.items()}, temporary)

    def load(self, folder: str | Path):
        """Goes on from what [`~MovingAverage.save`] wrote."""
        saved = safetensors.torch.load_file(Path(folder) / AVERAGE_NAME)
        for name, value in self.weights.items():
            tensor = saved[name].to(value.device)
            if isinstance(value, DTensor):
                tensor = distribute_tensor(tensor, value.device_mesh, value.placements)
            value.copy_(tensor)


__all__ = ["AVERAGE_NAME", "MovingAverage"]
