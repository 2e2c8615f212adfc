"""Rules that decide whether a stage or a score shows any learning. The demo and its report state the verdicts.

- A stage has learned when its loss at the end is clearly below its loss at the start ([`has_learned`]).
- A score counts as learned when it lies above chance by more than two standard errors ([`is_at_chance`]).
"""

import math
from itertools import combinations
from typing import Any, NamedTuple

from ett.scenes_ett import CHANCE, SHAPES, SIZES
from ett.scenes_ett.scenes import MAX_SHAPES, SEEN_PAIRS

MAX_LOSS_RATIO = 0.9
STANDARD_ERRORS = 2
STAGE_LOSSES = ("caption_loss", "reconstruction_loss", "loss")
"""The loss that judges a stage is the first of these in its history. The total loss of a tokenizer is no measure: the
entropy term is negative, and the adversarial term grows with the discriminator."""

ATTRIBUTE_CHANCE = {
    "count": CHANCE["count"],
    "place": None,
    "colour": CHANCE["colour"],
    "shape": CHANCE["shape"],
    "size": 1 / len(SIZES),
    "word": CHANCE["reading"],
}
"""Accuracy of a uniform guess of a caption's attribute, in 0..1. A caption may name any number of places, so that
`place` has none."""

_SHAPE_PAIRS = len(SHAPES) * (len(SHAPES) - 1) / 2
PROMPT_CHANCE = {
    "single object": 1 / len(SHAPES),
    "two objects": 1 / _SHAPE_PAIRS,
    "counting": 1 / (len(SHAPES) * (MAX_SHAPES - 1)),
    "colors": 1 / len(SEEN_PAIRS),
    # The other prompt asks for the same relation (1/4), its opposite (1/4), or one on the other axis, which holds by
    # chance in a third of the cases.
    "position": (1 / 4 + 1 / 2 * 1 / 3) / _SHAPE_PAIRS,
    "color attribution": 1
    / sum(color != other and shape != kind for (color, shape), (other, kind) in combinations(SEEN_PAIRS, 2)),
}
"""For each category, how often an image made for another prompt of the category satisfies a prompt, in 0..1. A model
that generates perfect images but ignores the prompt scores no better."""


class LossChange(NamedTuple):
    """Mean of a loss over the first and over the last tenth of its logged values."""

    name: str
    first: float
    last: float


def loss_change(stage: dict[str, Any]) -> LossChange | None:
    """The change of a stage's own loss (see `STAGE_LOSSES`), or `None` for a stage that logged no loss.

    Args:
        stage: A stage as the report takes it, with `history`.
    """
    for name in STAGE_LOSSES:
        values = [entry[name] for entry in stage["history"] if name in entry]
        if values:
            tenth = math.ceil(len(values) / 10)
            return LossChange(name, sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth)
    return None


def has_learned(stage: dict[str, Any]) -> bool:
    """Whether the mean loss of the last tenth of a stage is below 0.9 times the mean loss of its first tenth.

    Within a few steps every loss falls from random predictions to the mean frequencies of words or codes. A stage that
    stops there has not learned, so the first tenth is the reference and not the first value. A loss that is NaN at
    either end and a stage without a logged loss have not learned.

    Args:
        stage: A stage as the report takes it, with `history`.
    """
    change = loss_change(stage)
    return change is not None and change.last < MAX_LOSS_RATIO * change.first


def is_at_chance(accuracy: float, chance: float, count: int) -> bool:
    """Whether an accuracy does not exceed chance by more than two standard errors of `count` guesses.

    Args:
        accuracy, chance: In 0..1.
        count: The number of answers behind `accuracy`.
    """
    return count == 0 or accuracy <= chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / count)


__all__ = ["ATTRIBUTE_CHANCE", "PROMPT_CHANCE", "LossChange", "has_learned", "is_at_chance", "loss_change"]
