"""Reads an image back into a scene without any model, by analysis through synthesis, and judges drawings.

- The background is a plane of colour (a tint or a gradient), fitted to the pixels that nothing stands on.
- Each cell of the grid is compared with every shape, size, offset and blur, after what is left of the background in
  the cell, a plane of its own, was taken away; least squares gives the colour, and the
  template that explains most of what differs from the background wins. Rows are compared glyph by glyph with every
  text.
- What no template explains well enough, or hardly differs from the background, is not seen at all.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from .drawing import DrawingPrompt, stands
from .language import COUNT_WORDS, PLURALS
from .rendering import CELL_CENTERS, CELL_SIZE, IMAGE_SIZE, blend, glyph_mask, shape_mask
from .scenes import COLORS, NUMBERS, PLACES, ROWS, SHAPES, SIZES, WORDS, Scene, Shape, Text

BLURS = (0.0, 1.0, 2.0)
SHAPE_OFFSETS = tuple((right, down) for right in range(-2, 3) for down in range(-2, 3))
TEXT_OFFSETS = tuple((right, down) for right in range(-1, 2) for down in range(-1, 2))
MIN_EXPLAINED = 0.7
"""The least share of the energy (squared difference from the background) in a cell or row that must be explained."""
MIN_CONTRAST = 70.0
"""The least distance of a fitted colour from the background, in RGB of 0..255; real shapes stand 190 or more apart."""

MIN_FADING = 0.7
"""The least share of a colour's contrast that a faded shape keeps."""

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)


@dataclass(frozen=True)
class DetectedScene:
    """What an image shows: shapes in raster order, the text if there is one, the background's mean RGB (0..255)."""

    shapes: tuple[Shape, ...]
    text: Text | None
    background_rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Verdict:
    """Whether a drawing shows what its prompt asks for.

    `correct` is the whole verdict; `color_correct` says whether the colours that the prompt names are there at all, on
    whatever shapes (None when it names none); `reason` is one short sentence.
    """

    correct: bool
    color_correct: bool | None
    reason: str


@dataclass(frozen=True)
class _Templates:
    """Masks as rows of unit length [N, pixels], the lengths that they had [N], and what each one shows."""

    rows: np.ndarray
    lengths: np.ndarray
    names: list


def _templates(masks: dict, offsets: tuple[tuple[int, int], ...]) -> _Templates:
    rows, names = [], []
    for name, mask in masks.items():
        for blur in BLURS:
            image = Image.fromarray(np.rint(mask * 255).astype(np.uint8))
            blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32)
            for right, down in offsets:
                canvas = np.zeros((*mask.shape, 1), dtype=np.float32)
                blend(canvas, blurred / 255, (1,), down, right)
                rows.append(canvas.ravel())
                names.append(name)
    matrix = _without_plane(np.stack(rows)[..., None])[..., 0]
    lengths = np.linalg.norm(matrix, axis=1)
    return _Templates(matrix / lengths[:, None], lengths, names)


def _without_plane(windows: np.ndarray) -> np.ndarray:
    """`windows` [n, 24 * 24, channels] without the planes that lie nearest to them."""
    y, x = np.mgrid[-1 : 1 : CELL_SIZE * 1j, -1 : 1 : CELL_SIZE * 1j]
    basis, _ = np.linalg.qr(np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3).astype(np.float32))
    return windows - basis @ (basis.T @ windows)


@cache
def _shape_templates() -> _Templates:
    return _templates({(kind, size): shape_mask(kind, size) for kind in SHAPES for size in SIZES}, SHAPE_OFFSETS)


@cache
def _glyph_templates() -> _Templates:
    characters = sorted(set("".join((*WORDS, *NUMBERS))))
    return _templates({character: glyph_mask(character) for character in characters}, TEXT_OFFSETS)


@cache
def _plane_basis() -> np.ndarray:
    """The columns 1, x and y over all pixels: float32 [72 * 72, 3], x and y in -1..1."""
    y, x = np.mgrid[-1 : 1 : IMAGE_SIZE * 1j, -1 : 1 : IMAGE_SIZE * 1j]
    return np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3).astype(np.float32)


def _fit_background(pixels: np.ndarray) -> np.ndarray:
    """The plane [72, 72, 3] that most of the pixels lie near: least squares, again and again without the outliers."""
    basis, flat = _plane_basis(), pixels.reshape(-1, 3)
    plane = np.broadcast_to(np.median(flat, axis=0), flat.shape)
    for tolerance in (40.0, 30.0, 20.0, 20.0):
        near = np.abs(flat - plane).max(axis=1) < tolerance
        if near.mean() < 0.2:
            break
        chosen = basis[near]
        plane = basis @ np.linalg.lstsq(chosen, flat[near], rcond=None)[0]
    return plane.reshape(pixels.shape)


def _project(windows: np.ndarray, templates: _Templates) -> np.ndarray:
    """Each of `windows` [n, pixels, 3] onto each template: [N, n, 3]."""
    count = len(windows)
    return (templates.rows @ windows.transpose(1, 0, 2).reshape(-1, count * 3)).reshape(-1, count, 3)


def _match(windows: np.ndarray, templates: _Templates) -> list[tuple]:
    """For each of `windows` [n, pixels, 3]: the best template's name, the energy and share it explains, contrast."""
    projected = _project(windows, templates)
    energies = np.square(projected).sum(axis=-1)
    best = energies.argmax(axis=0)
    totals = np.square(windows).sum(axis=(1, 2)) + 1e-6
    return [
        (templates.names[b], energies[b, i], energies[b, i] / totals[i], projected[b, i] / templates.lengths[b])
        for i, b in enumerate(best)
    ]


def _read_row(strip: np.ndarray) -> tuple[str, float, float, np.ndarray]:
    """What a row [24, 72, 3] best reads as: the text, the energy and the share it explains, its mean contrast [3]."""
    cells = _without_plane(
        np.stack([strip[:, i : i + CELL_SIZE].reshape(-1, 3) for i in range(0, IMAGE_SIZE, CELL_SIZE)])
    )
    templates, total = _glyph_templates(), float(np.square(cells).sum()) + 1e-6
    best = ("", -1.0, 0.0, np.zeros(3))
    for contents, length in ((WORDS, 3), (NUMBERS, 2)):
        first = (IMAGE_SIZE - CELL_SIZE * length) // 2
        windows = [strip[:, first + CELL_SIZE * i : first + CELL_SIZE * (i + 1)].reshape(-1, 3) for i in range(length)]
        projected = _project(_without_plane(np.stack(windows)), templates)
        # [glyphs, blurs and offsets, positions]: the glyphs of a text share their blur and offset.
        energies = np.square(projected).sum(axis=-1).reshape(-1, len(BLURS) * len(TEXT_OFFSETS), length)
        glyphs = {name: number for number, name in enumerate(dict.fromkeys(templates.names))}
        numbers = np.array([[glyphs[character] for character in content] for content in contents])
        sums = sum(energies[numbers[:, i], :, i] for i in range(length))
        content, variant = np.unravel_index(sums.argmax(), sums.shape)
        if sums[content, variant] > best[1]:
            rows = numbers[content] * energies.shape[1] + variant
            contrast = projected[rows, range(length)] / templates.lengths[rows, None]
            energy = float(sums[content, variant])
            best = (contents[content], energy, energy / total, contrast.mean(axis=0))
    return best


def _nearest_color(contrast: np.ndarray, background: np.ndarray) -> str:
    """The palette's colour that differs from the background as `contrast` [3] does, if need be somewhat faded."""
    full = _PALETTE - background
    fading = ((full @ contrast) / np.square(full).sum(axis=1)).clip(MIN_FADING, 1)
    return list(COLORS)[np.square(fading[:, None] * full - contrast).sum(axis=1).argmin()]


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"expected an image of shape ({IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {image.shape}")
    if np.issubdtype(image.dtype, np.floating):
        image = image * 255
    return np.nan_to_num(image.astype(np.float32)).clip(0, 255)


def detect(image: Image.Image | np.ndarray) -> DetectedScene:
    """The scene that a 72x72 image shows.

    `image` is a PIL image, an integer array [72, 72, 3] in 0..255 or a float array [72, 72, 3] in 0..1 (values outside
    are clipped). Raises ValueError for any other size.
    """
    pixels = _as_pixels(image)
    background = _fit_background(pixels)
    half = CELL_SIZE // 2
    difference = np.pad(pixels - background, ((0, CELL_SIZE), (0, CELL_SIZE), (0, 0)))
    strips = [difference[y - half : y + half, :IMAGE_SIZE] for y in CELL_CENTERS]
    cells = [difference[y - half : y + half, x - half : x + half] for y in CELL_CENTERS for x in CELL_CENTERS]

    found: list[tuple[float, Shape] | None] = []
    windows = _without_plane(np.stack([cell.reshape(-1, 3) for cell in cells]))
    matches = _match(windows, _shape_templates())
    for index, ((kind, size), energy, share, contrast) in enumerate(matches):
        if share < MIN_EXPLAINED or np.linalg.norm(contrast) < MIN_CONTRAST:
            found.append(None)
            continue
        center = background[CELL_CENTERS[index // 3], CELL_CENTERS[index % 3]]
        found.append((energy, Shape(_nearest_color(contrast, center), kind, size, PLACES[index])))

    text = None
    readings = [_read_row(strip) for strip in strips]
    row = max(range(len(ROWS)), key=lambda row: readings[row][2])
    content, energy, share, contrast = readings[row]
    in_row = slice(3 * row, 3 * row + 3)
    explained_by_shapes = sum(seen[0] for seen in found[in_row] if seen is not None)
    if share >= MIN_EXPLAINED and contrast.max() < -MIN_CONTRAST and energy > explained_by_shapes:
        text = Text(content, ROWS[row])
        found[in_row] = [None] * 3
    mean = np.rint(background.mean(axis=(0, 1)).clip(0, 255))
    return DetectedScene(tuple(seen[1] for seen in found if seen is not None), text, tuple(int(v) for v in mean))


def _count_word(number: int) -> str:
    return ("no", *COUNT_WORDS)[number] if number <= len(COUNT_WORDS) else str(number)


def _name(color: str | None, kind: str) -> str:
    return kind if color is None else f"{color} {kind}"


def satisfies(prompt: DrawingPrompt, detected: DetectedScene | Scene) -> Verdict:
    """Whether a drawing shows what the prompt asks for, by GenEval's rules.

    Every object asked for must be there, each as a shape of its own, in its colour if the prompt names one and in the
    asked relation by row or column; what else is there does not matter. Only things to count must be there exactly as
    often as asked.
    """
    named = Counter(color for color, _ in prompt.objects if color is not None)
    color_correct = not named - Counter(shape.color for shape in detected.shapes) if named else None

    if prompt.count is not None:
        kind = prompt.objects[0][1]
        number = sum(shape.shape == kind for shape in detected.shapes)
        things = f"{kind} was" if number == 1 else f"{PLURALS[kind]} were"
        return Verdict(number == prompt.count, color_correct, f"{_count_word(number).capitalize()} {things} found.")

    candidates = [
        [shape for shape in detected.shapes if shape.shape == kind and color in (None, shape.color)]
        for color, kind in prompt.objects
    ]
    for (color, kind), found in zip(prompt.objects, candidates, strict=True):
        if not found:
            return Verdict(False, color_correct, f"No {_name(color, kind)} was found.")
    choices = [chosen for chosen in product(*candidates) if len({shape.place for shape in chosen}) == len(chosen)]
    if not choices:
        return Verdict(False, color_correct, f"Only one {_name(*prompt.objects[0])} was found.")
    if prompt.relation is not None and not any(
        stands(prompt.relation, first.place, second.place) for first, second in choices
    ):
        (_, first), (_, second) = prompt.objects
        return Verdict(False, color_correct, f"The {first} is not {prompt.relation} the {second}.")
    return Verdict(True, color_correct, "All that was asked for was found.")


__all__ = ["DetectedScene", "Verdict", "detect", "satisfies"]
