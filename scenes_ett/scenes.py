"""Scenes: small images of coloured shapes and short texts whose whole truth is known.

- A scene is data; its image is computed from it on demand, in under a millisecond (two with a texture). There are no
  files.
- `Scenes(seed, split, ground)[index]` depends on these four and on nothing else; another ground changes the background
  alone.
- Splits as in CLEVR-CoGenT: "train" and "test" show the same pairs of colour and shape; scenes of "unseen" always show
  at least one of `UNSEEN_PAIRS`, which the others never do.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .rendering import (
    CELL_CENTERS,
    CELL_SIZE,
    IMAGE_SIZE,
    INK,
    STRENGTHS,
    Background,
    background_pixels,
    blend,
    shaded,
    shape_mask,
    text_mask,
)

COLORS = {
    "red": (220, 30, 40),
    "orange": (250, 135, 10),
    "yellow": (240, 215, 20),
    "green": (35, 150, 60),
    "cyan": (30, 200, 220),
    "blue": (35, 75, 220),
    "purple": (145, 45, 175),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
ROWS = ("top", "middle", "bottom")
WORDS = tuple(
    "ash box bus cat dog egg elk fig hut ice ivy jam key leg map owl pen rug sun van vet web yak zoo".split()
)
NUMBERS = tuple(str(number) for number in range(10, 100))
SPLITS = ("train", "test", "unseen")
MAX_SHAPES = 4

UNSEEN_PAIRS = frozenset(
    {("green", "circle"), ("orange", "square"), ("blue", "triangle"), ("purple", "cross"), ("red", "ring")}
)
ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS)

TINTS = (
    (250, 250, 250),
    (226, 228, 232),
    (250, 243, 224),
    (248, 226, 230),
    (250, 230, 214),
    (250, 248, 214),
    (222, 243, 226),
    (216, 241, 243),
    (220, 233, 250),
    (233, 226, 248),
)
PLAIN = Background("plain", TINTS[0])
GROUNDS = {
    "plain": ("plain",),
    "flat": ("plain", "plain", "gradient", "stripes"),
    "textured": ("strong",),
    "mixed": ("plain", "plain", "gradient", "stripes", "soft", "soft", "strong", "strong"),
}
"""Kinds of background by the ground's name, each as likely as any other; "soft" and "strong" are textures."""
TEXT_RATE = 0.4
GROUP_RATE = 0.2


@dataclass(frozen=True)
class Shape:
    """One shape: `color` of COLORS, `shape` of SHAPES, `size` of SIZES, `place` of PLACES."""

    color: str
    shape: str
    size: str
    place: str

    @property
    def row(self) -> int:
        """The grid's row, 0 (top) to 2 (bottom)."""
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        """The grid's column, 0 (left) to 2 (right)."""
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Text:
    """A word of WORDS or a number of NUMBERS, in lower case, that fills the grid's `row` of ROWS."""

    content: str
    row: str

    @property
    def kind(self) -> str:
        """ "number" or "word"."""
        return "number" if self.content.isdigit() else "word"


@dataclass(frozen=True)
class Scene:
    """An image's whole truth.

    `shapes` stand in raster order on distinct places. `jitter` moves each shape, and then the text, off its place's
    middle by (right, down) pixels; what it does not name stays in the middle.
    """

    shapes: tuple[Shape, ...]
    text: Text | None = None
    background: Background = PLAIN
    jitter: tuple[tuple[int, int], ...] = ()

    def pixels(self) -> np.ndarray:
        """The image as uint8 [72, 72, 3], RGB."""
        canvas = background_pixels(self.background).copy()
        layers = [
            (shape_mask(shape.shape, shape.size), shaded(COLORS[shape.color]), shape.row, CELL_CENTERS[shape.column])
            for shape in self.shapes
        ]
        if self.text is not None:
            layers.append((text_mask(self.text.content), INK, ROWS.index(self.text.row), IMAGE_SIZE // 2))
        for index, (mask, color, row, center) in enumerate(layers):
            right, down = self.jitter[index] if index < len(self.jitter) else (0, 0)
            top = CELL_CENTERS[row] - CELL_SIZE // 2 + down
            blend(canvas, mask, color, top, center - mask.shape[1] // 2 + right)
        return np.rint(canvas).astype(np.uint8)

    def render(self) -> Image.Image:
        """The image in Pillow's form, 72x72 RGB."""
        return Image.fromarray(self.pixels())


def random_stream(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one item: independent between seeds, splits, indices and streams (0 scenes, 1 drawings).

    Raises ValueError for an unknown split or a negative seed or index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected 'train', 'test' or 'unseen'")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed {seed} and index {index}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, SPLITS.index(split), index)))


def pick(rng: np.random.Generator, options):
    """One element of a sequence, each as likely as any other."""
    return options[rng.integers(len(options))]


def random_background(rng: np.random.Generator, ground: str = "mixed") -> Background:
    """One of the ground's backgrounds. Raises ValueError for an unknown ground."""
    if ground not in GROUNDS:
        raise ValueError(f"unknown ground {ground!r}: expected {', '.join(GROUNDS)}")
    kind, seed = pick(rng, GROUNDS[ground]), int(rng.integers(2**31))
    tint, second_tint = (TINTS[i] for i in rng.choice(len(TINTS), 2, replace=False))
    vertical, period = bool(rng.integers(2)), pick(rng, (4, 6, 8))
    if kind == "plain":
        return Background(kind, tint)
    if kind == "gradient":
        return Background(kind, tint, second_tint, vertical)
    if kind in STRENGTHS:
        return Background("texture", tint, strength=kind, seed=seed)
    return Background(kind, tint, None, vertical, period)


def arrange(
    rng: np.random.Generator,
    looks: list[tuple[str, str, str]],
    places: list[str],
    text: Text | None = None,
    ground: str = "mixed",
) -> Scene:
    """A scene of the given (color, shape, size) at the places of the same position, with jitter and background."""
    shapes = [Shape(*look, place) for look, place in zip(looks, places, strict=True)]
    shapes.sort(key=lambda shape: PLACES.index(shape.place))
    offsets = rng.integers(-1, 2, size=(len(shapes) + 1, 2)).tolist()
    return Scene(tuple(shapes), text, random_background(rng, ground), tuple((right, down) for right, down in offsets))


def _random_scene(rng: np.random.Generator, split: str, ground: str) -> Scene:
    text, free_places = None, list(PLACES)
    if rng.random() < TEXT_RATE:
        row = int(rng.integers(len(ROWS)))
        text = Text(pick(rng, pick(rng, (WORDS, NUMBERS))), ROWS[row])
        del free_places[3 * row : 3 * row + 3]

    pairs = ALL_PAIRS if split == "unseen" else SEEN_PAIRS
    first = pick(rng, sorted(UNSEEN_PAIRS) if split == "unseen" else SEEN_PAIRS)
    first_look = (*first, pick(rng, SIZES))
    if rng.random() < GROUP_RATE:
        group = int(rng.integers(2, MAX_SHAPES + 1))
        others = int(rng.integers(MAX_SHAPES + 1 - group))
    else:
        group, others = 1, int(rng.integers(MAX_SHAPES))
    looks = [first_look] * group + [(*pick(rng, pairs), pick(rng, SIZES)) for _ in range(others)]
    places = [free_places[i] for i in rng.choice(len(free_places), len(looks), replace=False)]
    return arrange(rng, looks, places, text, ground)


class Scenes:
    """The dataset of one seed, split and ground: `Scenes(seed, split)[index]` is a `Scene`.

    Without `length` it has no end: any index from 0 on is valid, and `len()` and iteration are refused.
    Raises ValueError for an unknown split or ground, or a negative seed.
    """

    def __init__(self, seed: int, split: str, length: int | None = None, ground: str = "mixed") -> None:
        random_background(random_stream(seed, split, 0, 0), ground)
        self.seed, self.split, self.length, self.ground = seed, split, length, ground

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("these scenes have no end: give Scenes a length")
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if index < 0 or (self.length is not None and index >= self.length):
            raise IndexError(f"scene {index} is outside of 0..{'' if self.length is None else self.length - 1}")
        return _random_scene(random_stream(self.seed, self.split, index, 0), self.split, self.ground)

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(len(self)))


__all__ = [
    "ALL_PAIRS",
    "COLORS",
    "GROUNDS",
    "MAX_SHAPES",
    "NUMBERS",
    "PLACES",
    "ROWS",
    "SEEN_PAIRS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TINTS",
    "UNSEEN_PAIRS",
    "WORDS",
    "Scene",
    "Scenes",
    "Shape",
    "Text",
    "arrange",
    "pick",
    "random_background",
    "random_stream",
]
