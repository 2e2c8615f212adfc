"""Two tokenizers' reconstructions of the same images side by side, as in Figure 3 of the ETT paper."""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm.auto import tqdm

from ett.common_ett.images import pixels_to_image
from ett.common_ett.metrics import psnr_of
from ett.modeling_ett.modeling_ibq import IBQModel

from .common import evaluating
from .data_sets import Images
from .measures import truncated
from .reconstruction import encode_decode

CELL = 1.9
"""Width of an image in the figure, in inches."""
ZOOM = 4
"""How many times a window is magnified."""
FRAME = "#e8442e"
FONT = {"family": "serif", "size": 9}

Window = tuple[int, int, int, int]


def draw_comparison(
    tokenizers: dict[str, IBQModel], images: Images, output: Path, count: int = 4, progress: bool = True
) -> list[dict[str, float]]:
    """
    Draws a row for each of the first `count` readable images: the original, what each tokenizer makes of it with its
    PSNR, and all of them magnified in the window where the two reconstructions differ most.

    Args:
        tokenizers: Two, by the names above their columns; they become float32.
        output (`Path`): An image's file, of a format that matplotlib writes.

    Returns:
        `list[dict[str, float]]`: The PSNRs in dB of each row, by name; of images truncated to 8 bits.

    Raises:
        ValueError: None of the images can be read.
    """
    readable = (image for image in map(images.__getitem__, range(len(images))) if torch.is_tensor(image))
    rows = []
    for pixels in tqdm(islice(readable, count), "Comparison", unit=" images", total=count, disable=not progress):
        rows.append([pixels, *(_reconstruct(tokenizer, pixels) for tokenizer in tokenizers.values())])
    if not rows:
        raise ValueError(f"None of the {len(images)} images of '{images.path}' can be read.")
    scores = [
        {name: _psnr(original, after) for name, after in zip(tokenizers, reconstructions, strict=True)}
        for original, *reconstructions in rows
    ]
    _draw(rows, scores, ("Original", *tokenizers), output)
    return scores


def most_different_window(first: torch.Tensor, second: torch.Tensor) -> Window:
    """Top, left, height and width of the window, a fourth as high and wide, where two images `(3, H, W)` differ most
    (in squared error; the first of equals)."""
    height, width = (max(1, side // ZOOM) for side in first.shape[1:])
    error = (first - second).square().mean(dim=0, keepdim=True)
    sums = F.avg_pool2d(error[None], (height, width), stride=1)[0, 0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return top, left, height, width


def _reconstruct(tokenizer: IBQModel, pixels: torch.Tensor) -> torch.Tensor:
    with evaluating(tokenizer.float()):
        return encode_decode(tokenizer, pixels[None].to(tokenizer.device))[1][0].cpu()


def _psnr(original: torch.Tensor, reconstruction: torch.Tensor) -> float:
    first, second = (truncated((pixels + 1) / 2) for pixels in (original, reconstruction))
    return psnr_of((first - second).square().mean(), 1.0).item()


def _draw(rows: list[list[torch.Tensor]], scores: list[dict[str, float]], names: tuple[str, ...], output: Path):
    ratio = rows[0][0].shape[1] / rows[0][0].shape[2]
    columns = len(names)
    # A narrow empty column stands between the images and their magnified windows.
    widths = [1] * columns + [0.08] + [1] * columns
    figure = Figure(figsize=(CELL * sum(widths), (CELL * ratio + 0.17) * len(rows) + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(widths), width_ratios=widths, squeeze=False)
    for line, images, psnr in zip(axes, rows, scores, strict=True):
        line[columns].set_axis_off()
        top, left, height, width = most_different_window(*images[1:])
        for cell, zoom, name, pixels in zip(line[:columns], line[columns + 1 :], names, images, strict=True):
            image = np.asarray(pixels_to_image(pixels))
            _show(cell, image)
            cell.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=FRAME, linewidth=1.2))
            _show(zoom, image[top : top + height, left : left + width])
            zoom.spines[:].set(visible=True, color=FRAME, linewidth=1.2)
            cell.set_xlabel(f"{psnr[name]:.2f} dB" if name in psnr else " ", fontdict=FONT, labelpad=2)
    for axis, name in zip((*axes[0][:columns], *axes[0][columns + 1 :]), names * 2, strict=True):
        axis.set_title(name, fontdict=FONT, pad=3)
    partial = output.with_name(f".{output.stem}.partial{output.suffix}")
    figure.savefig(partial, dpi=300)
    partial.replace(output)


def _show(axis: Axes, image: np.ndarray):
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


__all__ = ["draw_comparison", "most_different_window"]
