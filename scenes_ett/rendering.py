"""How a scene becomes pixels: geometry, cached alpha masks, backgrounds, and compositing.

- Coordinates are pixel corners: an image of 72 x 72 spans 0 to 72. A cell of the 3 x 3 grid has 24 pixels a side, so
  that it covers whole codes of 8 pixels (or 4, 6, 12) and a shape gives the same codes in every cell.
- Pillow renders each mask once, at four times the resolution; numpy blends the cached masks into the image.
- Words and numbers stand in capitals in Pillow's built-in TrueType font, one glyph of about 19 pixels for each 24.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 72
CELL_CENTERS = (12, 36, 60)
CELL_SIZE = 24
RADII = {"small": 6.5, "large": 10.5}
FONT_SIZE = 26
INK = (24, 24, 40)
STRIPE_CONTRAST = 8
SHADING = 0.08
"""How much lighter a shape is at its cell's top left corner, and how much darker at the opposite one."""

TEXTURE_SCALES = {4: 14.0, 8: 14.0, 16: 14.0, 32: 10.0}
"""Cells of noise a side, and the deviation of its grey values (0 to 255) at full strength."""
TEXTURE_COLOR = 0.5
"""Deviation of each channel's own noise, as a share of the grey values'."""
TEXTURE_DARKENING = 25.0
STRENGTHS = {"soft": 0.5, "strong": 1.0}

_SUPERSAMPLING = 4
_TEXT_STROKE = 3  # at the supersampled resolution: the built-in face is a thin one
_MAX_GLYPH_WIDTH = 20


@dataclass(frozen=True)
class Background:
    """What lies behind the shapes.

    `kind` is "plain" (one tint), "gradient" (from `tint` to `second_tint`), "stripes" (faint ones around `tint`) or
    "texture" (smooth noise of several scales in grey and colour over a darkened `tint`, as in photographs). Tints are
    RGB in 0..255. `vertical` says whether a gradient or stripes change from top to bottom; `period` is the stripes'
    period in pixels; `strength`, of STRENGTHS, and `seed` determine a texture.
    """

    kind: str
    tint: tuple[int, int, int]
    second_tint: tuple[int, int, int] | None = None
    vertical: bool = True
    period: int = 8
    strength: str = "strong"
    seed: int = 0


def _circle_box(radius: float) -> list[float]:
    center = CELL_SIZE / 2
    return [_SUPERSAMPLING * (center - radius), _SUPERSAMPLING * (center - radius)] + [
        _SUPERSAMPLING * (center + radius) - 1
    ] * 2


def _draw_polygon(draw: ImageDraw.ImageDraw, radius: float, corners: list[tuple[float, float]]) -> None:
    center = CELL_SIZE / 2
    draw.polygon([tuple(_SUPERSAMPLING * (center + radius * v) - 0.5 for v in corner) for corner in corners], fill=255)


def _downsampled(image: Image.Image, width: int) -> np.ndarray:
    alpha = np.asarray(image.resize((width, CELL_SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
    alpha.setflags(write=False)
    return alpha


@cache
def shape_mask(shape: str, size: str) -> np.ndarray:
    """The coverage of a shape in the middle of its cell: float32 [24, 24] in 0..1, read-only.

    Raises KeyError for an unknown size and ValueError for an unknown shape.
    """
    radius = RADII[size]
    image = Image.new("L", (CELL_SIZE * _SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(_circle_box(radius), fill=255)
    elif shape == "ring":
        draw.ellipse(_circle_box(radius), fill=255)
        draw.ellipse(_circle_box(radius * 0.55), fill=0)
    elif shape == "square":
        _draw_polygon(draw, radius, [(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)])
    elif shape == "triangle":
        _draw_polygon(draw, radius, [(0, -0.95), (1, 0.85), (-1, 0.85)])
    elif shape == "cross":
        _draw_polygon(draw, radius, [(-0.32, -1), (0.32, -1), (0.32, 1), (-0.32, 1)])
        _draw_polygon(draw, radius, [(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)])
    else:
        raise ValueError(f"unknown shape {shape!r}: expected circle, square, triangle, cross or ring")
    return _downsampled(image, CELL_SIZE)


@cache
def glyph_mask(character: str) -> np.ndarray:
    """The coverage of a letter or digit, as a capital, in the middle of its cell: float32 [24, 24], read-only."""
    side = CELL_SIZE * _SUPERSAMPLING
    font = ImageFont.load_default(size=FONT_SIZE * _SUPERSAMPLING)
    left, top, right, bottom = font.getbbox(character.upper(), stroke_width=_TEXT_STROKE)
    image = Image.new("L", (right - left, side))
    corner = (-left, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character.upper(), fill=255, font=font, stroke_width=_TEXT_STROKE)
    narrow = image.resize((min(image.width, _MAX_GLYPH_WIDTH * _SUPERSAMPLING), side), Image.Resampling.BOX)
    cell = Image.new("L", (side, side))
    cell.paste(narrow, ((side - narrow.width) // 2, 0))
    return _downsampled(cell, CELL_SIZE)


@cache
def text_mask(content: str) -> np.ndarray:
    """The coverage of a word or number in the middle of a row, 24 pixels a glyph: float32 [24, 72] in 0..1, read-only.

    Three glyphs stand in the cells of the row, two between them.
    """
    mask = np.zeros((CELL_SIZE, IMAGE_SIZE), dtype=np.float32)
    first = (IMAGE_SIZE - CELL_SIZE * len(content)) // 2
    for position, character in enumerate(content):
        left = first + CELL_SIZE * position
        mask[:, left : left + CELL_SIZE] = glyph_mask(character)
    mask.setflags(write=False)
    return mask


@lru_cache(maxsize=512)
def background_pixels(background: Background) -> np.ndarray:
    """The image with nothing on it: float32 [72, 72, 3] in 0..255, read-only.

    Raises ValueError for an unknown kind and KeyError for an unknown strength.
    """
    tint = np.array(background.tint, dtype=np.float32)
    if background.kind == "texture":
        pixels = tint - TEXTURE_DARKENING + _texture(background.seed) * STRENGTHS[background.strength]
        pixels = pixels.clip(0, 255)
    else:
        line = _line(background, tint)
        line = line[:, None] if background.vertical else line[None]
        pixels = np.array(np.broadcast_to(line, (IMAGE_SIZE, IMAGE_SIZE, 3)), dtype=np.float32)
    pixels.setflags(write=False)
    return pixels


def _line(background: Background, tint: np.ndarray) -> np.ndarray:
    """The colours along the direction in which they change, [72, 3]."""
    position = np.arange(IMAGE_SIZE, dtype=np.float32)[:, None]
    if background.kind == "plain":
        return np.repeat(tint[None], IMAGE_SIZE, axis=0)
    if background.kind == "gradient":
        return tint + position / (IMAGE_SIZE - 1) * (np.array(background.second_tint, dtype=np.float32) - tint)
    if background.kind == "stripes":
        return tint + np.where(position % background.period < background.period // 2, 0.5, -0.5) * STRIPE_CONTRAST
    raise ValueError(f"unknown background {background.kind!r}: expected plain, gradient, stripes or texture")


def _texture(seed: int) -> np.ndarray:
    """Noise of full strength around 0: float32 [72, 72, 3]."""
    rng = np.random.default_rng(seed)
    texture = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    for cells, deviation in TEXTURE_SCALES.items():
        noise = rng.standard_normal((4, cells, cells), dtype=np.float32) * deviation
        enlarge = _enlarging(cells)
        texture += (enlarge @ (noise[:1] + TEXTURE_COLOR * noise[1:]) @ enlarge.T).transpose(1, 2, 0)
    return texture


@cache
def _enlarging(cells: int) -> np.ndarray:
    """The matrix of Pillow's bicubic enlargement from `cells` values to a side's pixels: float32 [72, cells]."""
    unit = Image.fromarray(np.eye(cells, dtype=np.float32))
    return np.asarray(unit.resize((cells, IMAGE_SIZE), Image.Resampling.BICUBIC))


@cache
def shaded(color: tuple[int, int, int]) -> np.ndarray:
    """A shape's colour over its cell, lit from the top left: float32 [24, 24, 3] in 0..255, read-only."""
    slope = np.linspace(1, -1, CELL_SIZE, dtype=np.float32)
    light = 1 + SHADING * (slope[:, None] + slope) / 2
    pixels = (light[..., None] * np.array(color, dtype=np.float32)).clip(0, 255)
    pixels.setflags(write=False)
    return pixels


def blend(canvas: np.ndarray, mask: np.ndarray, color: tuple[int, int, int] | np.ndarray, top: int, left: int) -> None:
    """Paint through `mask` [h, w] onto `canvas` [H, W, 3] in place: one colour, or that of each pixel [h, w, 3]. What
    lies outside of the canvas is cut."""
    bottom, right = min(top + mask.shape[0], canvas.shape[0]), min(left + mask.shape[1], canvas.shape[1])
    first_row, first_column = max(top, 0), max(left, 0)
    region = canvas[first_row:bottom, first_column:right]
    inside = (slice(first_row - top, bottom - top), slice(first_column - left, right - left))
    color = np.asarray(color, dtype=np.float32)
    region += mask[inside][..., None] * ((color[inside] if color.ndim == 3 else color) - region)


__all__ = [
    "CELL_CENTERS",
    "CELL_SIZE",
    "IMAGE_SIZE",
    "INK",
    "RADII",
    "STRENGTHS",
    "Background",
    "background_pixels",
    "blend",
    "glyph_mask",
    "shaded",
    "shape_mask",
    "text_mask",
]
