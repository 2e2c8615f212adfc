"""How a scene becomes pixels: geometry, cached alpha masks, and compositing.

- Coordinates are pixel corners: a 64x64 picture spans 0 to 64, and the grid's outer cells lie symmetrically.
- Pillow draws each mask once, at four times the resolution; numpy blends the cached masks into the picture.
- Words and numbers stand in capitals in Pillow's built-in TrueType font, so that every glyph is about 19 pixels high.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 64
CELL_CENTERS = (11, 32, 53)
CELL_SIZE = 22
RADII = {"small": 6.0, "large": 9.5}
FONT_SIZE = 25
INK = (24, 24, 40)
STRIPE_CONTRAST = 8

_SUPERSAMPLING = 4
_TEXT_STROKE = 3  # at the supersampled resolution: the built-in face is a thin one


@dataclass(frozen=True)
class Background:
    """What lies behind the shapes: one tint, a gradient between two, or faint stripes around one.

    `kind` is "plain", "gradient" or "stripes"; `tint` and `second_tint` are RGB in 0..255 (a gradient ends at the
    second; the others ignore it); `vertical` says whether the colour changes from top to bottom; `period` is the
    stripes' period in pixels.
    """

    kind: str
    tint: tuple[int, int, int]
    second_tint: tuple[int, int, int] | None = None
    vertical: bool = True
    period: int = 8


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
    """The coverage of a shape in the middle of its cell: float32 [22, 22] in 0..1, read-only.

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
def text_mask(content: str) -> np.ndarray:
    """The coverage of a word or number, in capitals, in the middle of a row: float32 [22, 64] in 0..1, read-only."""
    image = Image.new("L", (IMAGE_SIZE * _SUPERSAMPLING, CELL_SIZE * _SUPERSAMPLING))
    font = ImageFont.load_default(size=FONT_SIZE * _SUPERSAMPLING)
    left, top, right, bottom = font.getbbox(content.upper(), stroke_width=_TEXT_STROKE)
    corner = ((image.width - left - right) / 2, (image.height - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, content.upper(), fill=255, font=font, stroke_width=_TEXT_STROKE)
    return _downsampled(image, IMAGE_SIZE)


@lru_cache(maxsize=512)
def background_pixels(background: Background) -> np.ndarray:
    """The picture with nothing on it: float32 [64, 64, 3] in 0..255, read-only.

    Raises ValueError for an unknown kind.
    """
    position = np.arange(IMAGE_SIZE, dtype=np.float32)[:, None]
    tint = np.array(background.tint, dtype=np.float32)
    if background.kind == "plain":
        line = np.repeat(tint[None], IMAGE_SIZE, axis=0)
    elif background.kind == "gradient":
        line = tint + position / (IMAGE_SIZE - 1) * (np.array(background.second_tint, dtype=np.float32) - tint)
    elif background.kind == "stripes":
        line = tint + np.where(position % background.period < background.period // 2, 0.5, -0.5) * STRIPE_CONTRAST
    else:
        raise ValueError(f"unknown background {background.kind!r}: expected plain, gradient or stripes")
    line = line[:, None] if background.vertical else line[None]
    pixels = np.array(np.broadcast_to(line, (IMAGE_SIZE, IMAGE_SIZE, 3)), dtype=np.float32)
    pixels.setflags(write=False)
    return pixels


def blend(canvas: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], top: int, left: int) -> None:
    """Paint `color` through `mask` [h, w] onto `canvas` [H, W, 3] in place; what lies outside of the canvas is cut."""
    bottom, right = min(top + mask.shape[0], canvas.shape[0]), min(left + mask.shape[1], canvas.shape[1])
    first_row, first_column = max(top, 0), max(left, 0)
    region = canvas[first_row:bottom, first_column:right]
    alpha = mask[first_row - top : bottom - top, first_column - left : right - left, None]
    region += alpha * (np.array(color, dtype=np.float32) - region)


__all__ = [
    "CELL_CENTERS",
    "CELL_SIZE",
    "IMAGE_SIZE",
    "INK",
    "RADII",
    "Background",
    "background_pixels",
    "blend",
    "shape_mask",
    "text_mask",
]
