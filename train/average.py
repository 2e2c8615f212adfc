"""The moving average of the weights (EMA), which tokenizers are judged and published by."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback


def start_average(model: nn.Module, decay: float) -> AveragedModel:
    """The moving average with a constant decay, starting from the model's present weights."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
    # The first update copies instead of averaging; later ones then start from the initial weights.
    average.update_parameters(model)
    return average


@contextmanager
def exchanged_weights(model: nn.Module, average: AveragedModel) -> Iterator[None]:
    """Within it, the model has the average's weights, and the average the model's; nothing is copied."""
    _exchange(model, average.module)
    try:
        yield
    finally:
        _exchange(model, average.module)


def _exchange(one: nn.Module, other: nn.Module):
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        ours.data, theirs.data = theirs.data, ours.data


class AverageCallback(TrainerCallback):
    """Updates the average after each step of the optimizer."""

    def __init__(self, average: AveragedModel):
        self.average = average

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


__all__ = ["AverageCallback", "exchanged_weights", "start_average"]
