"""Records whether gradients reach the encoder while a tokenizer learns, and warns where they do not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modeling_ett.gradient_path import DEAD_BELOW, measure_gradient_path
from modeling_ett.quantizer_ibq import IBQQuantizer

logger = logging.getLogger(__name__)

PREFIX = "gradient_path/"


@contextmanager
def recording_gradient_path(quantizer: IBQQuantizer, record: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within it, the quantizer's calls record `gradient_path/ratio`, `gradient_path/largest_probability` and
    `gradient_path/dead_tokens` of their latents (see [`GradientPath`])."""

    # A hook, since weights in shards are whole only while the model computes.
    def measure(module, inputs, output):
        for name, value in measure_gradient_path(module, inputs[0]).summary().items():
            record(PREFIX + name, value)

    handle = quantizer.register_forward_hook(measure)
    try:
        yield
    finally:
        handle.remove()


def warn_of_closed_path(figures: dict[str, float]) -> bool:
    """Warns where the recorded ratio is below [`DEAD_BELOW`]. Returns whether it did."""
    ratio = figures.get(f"{PREFIX}ratio")
    if ratio is None or ratio >= DEAD_BELOW:
        return False
    logger.warning(
        "The gradients of captions and reconstructions hardly reach the encoder: %.1e of a straight-through copy "
        "passes the quantizer (gradient_path/ratio). Its softmax gives one code a probability of %.3f. Start again "
        "with a lower model.logit_scale, or with model.straight_through_weight above 0, for instance 0.1.",
        ratio,
        figures[f"{PREFIX}largest_probability"],
    )
    return True


__all__ = ["recording_gradient_path", "warn_of_closed_path"]
