"""Several sources of examples as one, by weight."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset


class MixedExamples(Dataset):
    """Examples of several sources in shares that follow their weights, in a mixed order that the seed alone decides.

    It is as long as its sources are together. Weights that follow the sources' lengths thus show every example once;
    of a source with a larger share some are shown again, each as often as any other or once more, and of one with a
    smaller share not all are shown.

    Args:
        sources (`dict[str, Dataset]`): Map-style examples, by the source's name.
        weights (`dict[str, float]`): Above 0, by the source's name.
    """

    def __init__(self, sources: dict[str, Any], weights: dict[str, float], seed: int = 0):
        self.sources = sources
        total = sum(map(len, sources.values()))
        counts = shares(total, [weights[name] for name in sources])
        rng = np.random.default_rng(seed)
        self.indices = np.empty(total, dtype=np.int64)
        self.numbers = rng.permutation(np.repeat(np.arange(len(sources), dtype=np.int16), counts))
        for number, (examples, count) in enumerate(zip(sources.values(), counts, strict=True)):
            passes = -(-count // len(examples))
            order = [rng.permutation(len(examples)) for _ in range(passes)]
            self.indices[self.numbers == number] = np.concatenate([*order, []])[:count]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, examples = list(self.sources.items())[self.numbers[index]]
        example = examples[int(self.indices[index])]
        return {**example, "name": f"{name}: {example['name']}"}

    @property
    def skipped(self) -> dict[str, str]:
        """Rows of all sources that were skipped, by name, and why."""
        return {
            f"{name}: {row}": reason
            for name, examples in self.sources.items()
            for row, reason in getattr(examples, "skipped", {}).items()
        }

    def take_skipped(self) -> dict[str, str]:
        """As [`SkippedRows.take`], of all sources."""
        return {
            f"{name}: {row}": reason
            for name, examples in self.sources.items()
            if hasattr(examples, "take_skipped")
            for row, reason in examples.take_skipped().items()
        }

    def filters_report(self) -> list[dict[str, Any]]:
        """As [`FilterChain.report`], of all sources, with the name of each."""
        return [
            {"source": name, **one} for name, examples in self.sources.items() for one in examples.filters_report()
        ]

    def texts(self) -> list[str]:
        """Every text that a word-level tokenizer has to know."""
        return [text for examples in self.sources.values() for text in examples.texts()]

    def spelled(self) -> list[str]:
        """Words that a word-level tokenizer spells letter by letter."""
        return [word for examples in self.sources.values() for word in examples.spelled()]


def shares(total: int, weights: list[float]) -> list[int]:
    """`total` things shared out by weight, to whole numbers that add up to it.

    >>> shares(10, [1, 1, 1])
    [4, 3, 3]
    """
    exact = np.asarray(weights, dtype=float) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[largest] += 1
    return counts.tolist()


__all__ = ["MixedExamples", "shares"]
