"""Drawing prompts in GenEval's six categories, and scenes that show exactly what they ask for."""

from dataclasses import dataclass

import numpy as np

from .language import COUNT_WORDS, PLURALS, RELATIONS
from .scenes import (
    ALL_PAIRS,
    MAX_SHAPES,
    PLACES,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    Scene,
    arrange,
    pick,
    random_stream,
)

PROMPT_CATEGORIES = ("single object", "two objects", "counting", "colors", "position", "color attribution")


@dataclass(frozen=True)
class DrawingPrompt:
    """What a drawing must show.

    `category` is one of PROMPT_CATEGORIES; `objects` are (color or None, shape), in the prompt's order; `count` is how
    many of the first object there must be (category "counting"); `relation`, one of RELATIONS, is where the first
    object must stand as seen from the second (category "position").
    """

    category: str
    objects: tuple[tuple[str | None, str], ...]
    count: int | None = None
    relation: str | None = None

    @property
    def text(self) -> str:
        """The prompt in words, such as "a red circle and a blue square"."""
        if self.count is not None:
            return f"{COUNT_WORDS[self.count - 1]} {PLURALS[self.objects[0][1]]}"
        return f" {self.relation or 'and'} ".join(_noun(*thing) for thing in self.objects)


def _noun(color: str | None, shape: str) -> str:
    words = shape if color is None else f"{color} {shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def stands(relation: str, first_place: str, second_place: str) -> bool:
    """Whether the first of two PLACES lies `relation` (of RELATIONS) the second: strictly, by row or by column."""
    (first_row, first_column), (second_row, second_column) = (
        divmod(PLACES.index(place), 3) for place in (first_place, second_place)
    )
    return {
        "above": first_row < second_row,
        "below": first_row > second_row,
        "left of": first_column < second_column,
        "right of": first_column > second_column,
    }[relation]


def _random_prompt(rng: np.random.Generator, split: str, category: str) -> DrawingPrompt:
    if category in ("colors", "color attribution"):
        first = pick(rng, sorted(UNSEEN_PAIRS) if split == "unseen" else SEEN_PAIRS)
        if category == "colors":
            return DrawingPrompt(category, (first,))
        pairs = ALL_PAIRS if split == "unseen" else SEEN_PAIRS
        second = pick(rng, [(color, shape) for color, shape in pairs if color != first[0] and shape != first[1]])
        return DrawingPrompt(category, (first, second) if rng.integers(2) else (second, first))
    first, second = ((None, SHAPES[i]) for i in rng.choice(len(SHAPES), 2, replace=False))
    if category == "single object":
        return DrawingPrompt(category, (first,))
    if category == "counting":
        return DrawingPrompt(category, (first,), count=int(rng.integers(2, MAX_SHAPES + 1)))
    relation = pick(rng, RELATIONS) if category == "position" else None
    return DrawingPrompt(category, (first, second), relation=relation)


def drawing_pair(seed: int, split: str, index: int, ground: str = "plain") -> tuple[DrawingPrompt, Scene]:
    """A prompt and a scene that shows exactly what it asks for, determined by the four arguments.

    Categories follow one another by index, so any six in a row cover all. What the prompt leaves open is random,
    except that things to count look alike. In the splits "train" and "test" prompt and scene hold no pair of
    UNSEEN_PAIRS; in "unseen" a prompt that names colours holds at least one. Raises ValueError for an unknown split or
    ground, or a negative seed or index.
    """
    rng = random_stream(seed, split, index, 1)
    prompt = _random_prompt(rng, split, PROMPT_CATEGORIES[index % len(PROMPT_CATEGORIES)])
    pairs = ALL_PAIRS if split == "unseen" else SEEN_PAIRS
    looks = []
    for color, shape in prompt.objects:
        color = color or pick(rng, [pair[0] for pair in pairs if pair[1] == shape])
        looks.append((color, shape, pick(rng, SIZES)))
    looks *= prompt.count or 1
    while True:
        places = [PLACES[i] for i in rng.choice(len(PLACES), len(looks), replace=False)]
        if prompt.relation is None or stands(prompt.relation, *places):
            return prompt, arrange(rng, looks, places, ground=ground)


__all__ = [
    "PROMPT_CATEGORIES",
    "DrawingPrompt",
    "drawing_pair",
    "stands",
]
