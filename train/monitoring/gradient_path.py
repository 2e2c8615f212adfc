"""Records whether gradients reach the encoder while a tokenizer learns, and warns where they do not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ett.modeling_ett.gradient_path import is_closed, measure_gradient_path
from ett.modeling_ett.quantizer_ibq import IBQQuantizer

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
    """Warns where the recorded figures say that the path is closed (see [`is_closed`]). Returns whether it did."""
    if f"{PREFIX}ratio" not in figures:
        return False
    ratio, largest, dead = (figures[PREFIX + name] for name in ("ratio", "largest_probability", "dead_tokens"))
    if not is_closed(ratio, dead):
        return False
    logger.warning(
        "Gradients of captions and reconstructions hardly reach the encoder: gradient_path/ratio is %.1e, and %.1f%% "
        "of the tokens get none. The quantizer's softmax gives one code a probability of %.3f on average. Start again "
        "with a %s model.logit_scale, or with model.straight_through_weight above 0, for instance 0.1.",
        ratio,
        100 * dead,
        largest,
        # A softmax that is even over the codebook passes as little as one that is all on one code.
        "lower" if largest > 0.5 else "higher",
    )
    return True


__all__ = ["recording_gradient_path", "warn_of_closed_path"]
