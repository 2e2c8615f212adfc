"""The cells of a study as numbers: means with 95% intervals over seeds, and differences paired by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from ett.scenes_ett import PROMPT_CATEGORIES, QUESTION_TYPES

from .charts import MINUS

UNKNOWN = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
CONFIDENCE = 0.95
GROUNDS = ("textured", "flat")
"""Grounds in the report's order."""
BEFORE = "tokenizer"
"""The arm that measures the tokenizer before stage 2."""
FROZEN, TUNED = "embedding-frozen", "alpha-0.25"
ALPHAS = ("alpha-0", "alpha-0.25", "alpha-0.5", "alpha-1")
ATTRIBUTES = ("count", "place", "colour", "shape", "size", "word")

TITLES = {
    "tokenizer": "before tuning",
    "index-frozen": "index, frozen",
    "embedding-frozen": "embedding, frozen",
    "alpha-0": "tuned, understanding only (\N{GREEK SMALL LETTER ALPHA} = 0)",
    "alpha-0.25": "tuned, \N{GREEK SMALL LETTER ALPHA} = 0.25",
    "alpha-0.5": "tuned, \N{GREEK SMALL LETTER ALPHA} = 0.5",
    "alpha-1": "tuned, \N{GREEK SMALL LETTER ALPHA} = 1",
    "vq-only": "tuned by L_vq alone, caption gradient cut",
    "frozen-twice-as-long": "embedding, frozen, stage 2 twice as long",
    "fresh-language-model": "tuned tokenizer, frozen, with a fresh language model",
    "embedding-frozen-long-chat": "embedding, frozen",
    "alpha-0.25-long-chat": "tuned, \N{GREEK SMALL LETTER ALPHA} = 0.25",
}


@dataclass(frozen=True)
class Measure:
    """How a measure is shown: its title, times `scale`, with so many digits; `unit` of a difference."""

    title: str
    scale: float = 100.0
    digits: int = 1
    unit: str = " points"


MEASURES = {
    "questions.general": Measure("general questions, %"),
    "questions.mean": Measure("all questions, %"),
    **{f"questions.{name}": Measure(f"{name}, %") for name in QUESTION_TYPES},
    "captions.semantic.loss": Measure("caption loss, nats", 1, 3, " nats"),
    "captions.chat.loss": Measure("caption loss after chat, nats", 1, 3, " nats"),
    "captions.semantic.true": Measure("true captions after stage 2, %"),
    "captions.chat.true": Measure("true captions, %"),
    **{f"captions.{stage}.{name}": Measure(f"{name}, %") for stage in ("semantic", "chat") for name in ATTRIBUTES},
    "generation.mean": Measure("generation, %"),
    "generation.colours": Measure("colours asked for, %"),
    **{f"generation.{name}": Measure(f"{name}, %") for name in PROMPT_CATEGORIES},
    "tokenizer.psnr": Measure("PSNR, dB", 1, 2, " dB"),
    "tokenizer.ssim": Measure("SSIM", 1, 3, ""),
    "tokenizer.frechet": Measure("Fréchet distance", 1, 3, ""),
    "tokenizer.codebook_usage": Measure("codes used, %"),
    "tokenizer.perplexity": Measure("perplexity", 1, 0, ""),
    "tokenizer.shapes_read": Measure("shapes read, %"),
    "tokenizer.texts_read": Measure("texts read, %"),
    **{f"probe.{name}": Measure(f"{name}, %") for name in ("colour", "shape", "letter")},
}


@dataclass(frozen=True)
class Statistic:
    """A mean over `count` seeds and half the width of its 95% interval (`None` for one seed)."""

    mean: float
    half: float | None
    count: int


def summarize(values: Sequence[float]) -> Statistic | None:
    """Mean and Student's 95% interval; `None` without values."""
    if not values:
        return None
    if len(values) == 1:
        return Statistic(values[0], None, 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Statistic(statistics.fmean(values), half, len(values))


class Results:
    """The cells of a results file.

    A measure that an arm's own cell lacks is that of the cell which the arm shares: the generation of an arm, and the
    tokenizer before tuning of arms that do not tune it.

    Args:
        cells: As in the results file: `ground`, `seed`, `arm`, `status`, and `measures` of those that are done.
    """

    def __init__(self, cells: dict[str, dict[str, Any]]):
        self.cells = cells
        self.measures: dict[tuple[str, str], dict[int, dict[str, float | None]]] = {}
        for cell in cells.values():
            if cell["status"] == "done":
                self.measures.setdefault((cell["ground"], cell["arm"]), {})[cell["seed"]] = cell["measures"]

    def grounds(self) -> list[str]:
        present = {cell["ground"] for cell in self.cells.values()}
        return [name for name in GROUNDS if name in present]

    def seeds(self, ground: str, arm: str) -> list[int]:
        return sorted(self.measures.get((ground, arm), {}))

    def values(self, ground: str, arm: str, measure: str) -> dict[int, float]:
        """A measure of an arm by seed."""
        sources = [arm]
        if measure.startswith("generation."):
            sources = [f"{arm}-generation"]
        elif measure.startswith(("tokenizer.", "probe.")):
            sources.append(BEFORE)
        for source in sources:
            by_seed = self.measures.get((ground, source), {})
            values = {
                seed: measures[measure] for seed, measures in by_seed.items() if measures.get(measure) is not None
            }
            if values or self.is_tuned(ground, source):
                return values
        return {}

    def is_tuned(self, ground: str, arm: str) -> bool:
        """Whether cells of this arm have a tokenizer of their own, so that no other arm's may stand for it."""
        return arm in (*ALPHAS, "vq-only")

    def statistic(self, ground: str, arm: str, measure: str, seeds: Sequence[int] | None = None) -> Statistic | None:
        values = self.values(ground, arm, measure)
        return summarize([value for seed, value in sorted(values.items()) if seeds is None or seed in seeds])

    def difference(self, ground: str, arm: str, other: str, measure: str) -> Statistic | None:
        """Mean difference `arm - other` over the seeds that both have."""
        one, two = self.values(ground, arm, measure), self.values(ground, other, measure)
        return summarize([one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())])


def format_statistic(statistic: Statistic | None, measure: str) -> str:
    """Such as `51.5 ± 2.1`; the mean alone without an interval."""
    if statistic is None:
        return UNKNOWN
    shown = MEASURES[measure]
    mean = f"{shown.scale * statistic.mean:.{shown.digits}f}".replace("-", MINUS)
    if statistic.half is None:
        return mean
    return f"{mean} {PLUS_MINUS} {shown.scale * statistic.half:.{shown.digits}f}"


def format_difference(statistic: Statistic, measure: str) -> str:
    """Such as `+6.9 ± 2.1 points`."""
    sign = "" if statistic.mean < 0 else "+"
    return f"{sign}{format_statistic(statistic, measure)}{MEASURES[measure].unit}"


__all__ = [
    "ALPHAS",
    "ATTRIBUTES",
    "BEFORE",
    "FROZEN",
    "GROUNDS",
    "MEASURES",
    "TITLES",
    "TUNED",
    "UNKNOWN",
    "Results",
    "Statistic",
    "format_difference",
    "format_statistic",
    "summarize",
]
