"""Images to pixels and back."""

import numpy as np
import torch
from PIL import Image


def to_unit_range(levels: torch.Tensor) -> torch.Tensor:
    """Levels in 0..255 to floats in `[-1, 1]`."""
    return levels.float() / 127.5 - 1


def image_to_pixels(image: Image.Image) -> torch.Tensor:
    """An image to float32 pixels `(3, H, W)` in `[-1, 1]`."""
    return to_unit_range(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def pixels_to_image(pixels: torch.Tensor) -> Image.Image:
    """Pixels `(3, H, W)` in `[-1, 1]`, clamped, to an image of 8 bits a channel."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


__all__ = ["image_to_pixels", "pixels_to_image", "to_unit_range"]
