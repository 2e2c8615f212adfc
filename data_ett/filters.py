"""Filters: what decides whether a row of a dataset is learned from.

The paper chooses images to draw from by resolution and by the LAION aesthetic score (sections 3.3 and 4.1); aspect
ratio, length of captions and near duplicates are the usual company. An image that cannot be read is kept: to skip,
count and name it is the reader's part.
"""

import base64
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ett.common_ett.suggestions import suggestion
from ett.processing_ett import ImageError

from .aesthetics import CLIP_NAME, HEAD_NAME, AestheticPredictor
from .captions import caption_texts
from .image_rows import image_sizes, open_images

Row = dict[str, Any]
HASH_BITS = 64


@dataclass
class Columns:
    """What a dataset calls its images and its captions, and the folder to which images' names are relative."""

    image: str = "image"
    text: str = "text"
    folder: str = ""


@dataclass(kw_only=True)
class Filter:
    """One step: which rows it keeps, in their order. Its fields are what a recipe sets."""

    columns: Columns = field(default_factory=Columns, repr=False)

    def reads(self) -> str:
        """The one column that it reads."""
        return self.columns.image

    def keep(self, rows: list[Row]) -> list[bool]:
        """Whether each of the rows is kept."""
        return [_unless_unreadable(self.keeps, row) for row in rows]

    def keeps(self, row: Row) -> bool:
        raise NotImplementedError

    def state(self) -> str:
        """What it remembers of the rows it has seen, which [`Filter.restore`] takes."""
        return ""

    def restore(self, state: str):
        """Goes on from a state, or with an empty one from the start."""

    def open(self, row: Row) -> list[Image.Image]:
        """The row's images, decoded. Raises `ImageError`."""
        return open_images(row.get(self.columns.image), self.columns.folder)

    def sizes(self, row: Row) -> list[tuple[int, int]]:
        """Width and height of each of the row's images, of which headers are read alone. Raises `ImageError`."""
        return image_sizes(row.get(self.columns.image), self.columns.folder)


@dataclass(kw_only=True)
class Resolution(Filter):
    """The shorter side of every image has `min_side` pixels or more; read from the header alone."""

    min_side: int

    def __post_init__(self):
        _require(self, "min_side", self.min_side, 1, whole=True)

    def keeps(self, row: Row) -> bool:
        return all(min(size) >= self.min_side for size in self.sizes(row))


@dataclass(kw_only=True)
class AspectRatio(Filter):
    """The longer side of every image is at most `max` times the shorter; read from the header alone."""

    max: float

    def __post_init__(self):
        _require(self, "max", self.max, 1)

    def keeps(self, row: Row) -> bool:
        return all(max(size) <= self.max * min(size) for size in self.sizes(row))


@dataclass(kw_only=True)
class CaptionLength(Filter):
    """The caption, or each where a row has several, has `min_words` to `max_words` words, set apart by white space."""

    min_words: int = 1
    max_words: int | None = None

    def __post_init__(self):
        _require(self, "min_words", self.min_words, 0, whole=True)
        if self.max_words is not None:
            _require(self, "max_words", self.max_words, max(1, self.min_words), whole=True)

    def reads(self) -> str:
        return self.columns.text

    def keeps(self, row: Row) -> bool:
        lengths = [len(caption.split()) for caption in caption_texts(row.get(self.columns.text)) or [""]]
        return all(self.min_words <= length <= (self.max_words or length) for length in lengths)


@dataclass(kw_only=True)
class NearDuplicates(Filter):
    """An image of the row is unlike all images before it: their [`difference_hash`]es differ in more than `distance`
    of 64 bits. So the first of near duplicates is kept.

    Exact for every distance: the hashes lie in `distance + 1` bands of bits, and two that differ in no more bits than
    that agree in one band at least. Bands of few bits sort out little: beyond a distance of 5 or so, time grows with
    the number of images kept. A stream's state holds 11 bytes for each of them.
    """

    distance: int = 4

    def __post_init__(self):
        _require(self, "distance", self.distance, 0, HASH_BITS - 1, whole=True)
        bounds = [HASH_BITS * band // (self.distance + 1) for band in range(self.distance + 2)]
        self._bands = [(start, (1 << end - start) - 1) for start, end in itertools.pairwise(bounds)]
        self.restore("")

    def keeps(self, row: Row) -> bool:
        hashes = [difference_hash(image) for image in self.open(row)]
        unlike = [number for number in hashes if not self._is_known(number)]
        for number in unlike:
            self._remember(number)
        return bool(unlike) or not hashes

    def state(self) -> str:
        return base64.b64encode(np.array(self._hashes, dtype=np.uint64).tobytes()).decode()

    def restore(self, state: str):
        self._hashes: list[int] = []
        self._tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in self._bands]
        for number in np.frombuffer(base64.b64decode(state), dtype=np.uint64).tolist():
            self._remember(number)

    def _remember(self, number: int):
        self._hashes.append(number)
        for table, (start, mask) in zip(self._tables, self._bands, strict=True):
            table[number >> start & mask].append(number)

    def _is_known(self, number: int) -> bool:
        return any(
            (number ^ other).bit_count() <= self.distance
            for table, (start, mask) in zip(self._tables, self._bands, strict=True)
            for other in table.get(number >> start & mask, ())
        )


def difference_hash(image: Image.Image) -> int:
    """64 bits of what an image looks like (dHash): in grey and 9 x 8 pixels, whether each is darker than the one to
    its right.

    >>> difference_hash(Image.linear_gradient("L").rotate(90)) == 2**64 - 1
    True
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes(), "big")


@dataclass(kw_only=True)
class Aesthetic(Filter):
    """The LAION aesthetic score of every image, about 1 to 10, is `min_score` or more (paper, section 4.1).

    It stands in the data's `column`, where a row without a score is removed and no image is opened; or it is
    computed by an [`AestheticPredictor`] of CLIP `model` and `head`, on the accelerator if there is one, and on the
    CPU in a data loader's worker.
    """

    min_score: float
    column: str | None = None
    model: str = CLIP_NAME
    head: str = HEAD_NAME

    def __post_init__(self):
        _require(self, "min_score", self.min_score)
        self._predictor: AestheticPredictor | None = None

    def reads(self) -> str:
        return self.column or self.columns.image

    def keep(self, rows: list[Row]) -> list[bool]:
        if self.column is not None:
            return super().keep(rows)
        pixels = [_unless_unreadable(self._preprocess, row, default=[]) for row in rows]
        if not any(pixels):
            return [True] * len(rows)
        scores = iter(self.predictor(torch.stack(list(itertools.chain(*pixels)))).tolist())
        return [all([next(scores) >= self.min_score for _ in own]) for own in pixels]

    def keeps(self, row: Row) -> bool:
        score = row.get(self.column)
        if score is not None and not isinstance(score, (int, float)):
            raise ValueError(
                f"The column {self.column!r} holds {score!r}; expected aesthetic scores, which are numbers."
            )
        return score is not None and score >= self.min_score

    @property
    def predictor(self) -> AestheticPredictor:
        """Loaded when it is first asked for."""
        if self._predictor is None:
            # A process that was forked cannot use CUDA.
            in_worker = torch.utils.data.get_worker_info() is not None
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if in_worker or accelerator is None else accelerator
            self._predictor = AestheticPredictor.from_pretrained(self.model, self.head).to(device)
        return self._predictor

    def _preprocess(self, row: Row) -> list[torch.Tensor]:
        return [self.predictor.preprocess(image) for image in self.open(row)]


FILTERS: dict[str, type[Filter]] = {
    "resolution": Resolution,
    "aspect_ratio": AspectRatio,
    "caption_length": CaptionLength,
    "near_duplicates": NearDuplicates,
    "aesthetic": Aesthetic,
}


def build_filter(setting: dict[str, Any], columns: Columns) -> Filter:
    """A filter of its `type` and fields.

    Raises:
        ValueError: Type, field or value is unknown or unusable.
    """
    if not isinstance(setting, dict) or "type" not in setting:
        raise ValueError(
            f"data.filters has {setting!r}; expected a mapping such as {{type: resolution, min_side: 512}}."
        )
    name, values = setting["type"], {key: value for key, value in setting.items() if key != "type"}
    if name not in FILTERS:
        raise ValueError(f"data.filters has an unknown type {name!r}.{suggestion(str(name), list(FILTERS))}")
    known = {item.name: item for item in dataclasses.fields(FILTERS[name]) if item.name != "columns"}
    for key in values:
        if key not in known:
            raise ValueError(f"The filter {name} has an unknown field {key!r}.{suggestion(str(key), list(known))}")
    missing = [key for key, item in known.items() if item.default is dataclasses.MISSING and key not in values]
    if missing:
        raise ValueError(f"The filter {name} needs the field {missing[0]!r}.")
    return FILTERS[name](**values, columns=columns)


def _require(step: Filter, name: str, value: Any, low: float = -np.inf, high: float = np.inf, whole: bool = False):
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        bounds = " or more" if high == np.inf else f" to {high:g}"
        expected = ("a whole number" if whole else "a number") + (f", {low:g}{bounds}" if low > -np.inf else "")
        kind = next(kind for kind, known in FILTERS.items() if isinstance(step, known))
        raise ValueError(f"{name} of the filter {kind} is {value!r}; expected {expected}.")


def _unless_unreadable(look: Callable[[Row], Any], row: Row, default: Any = True) -> Any:
    try:
        return look(row)
    except ImageError:
        return default


__all__ = ["FILTERS", "Columns", "Filter", "Row", "build_filter", "difference_hash"]
