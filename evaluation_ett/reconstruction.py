"""How much of an image survives its way through codes.

- PSNR and SSIM are of values in [0, 1] after clamping, without rounding to 8 bits (see [`Measures`]).
- Of scenes, the detector reads original and reconstruction alike: what it misses in both is the detector's fault.
"""

from collections.abc import Iterable

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ett.common_ett.images import pixels_to_image
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.scenes_ett import Scene
from ett.scenes_ett.detector import detect

from .common import batches, evaluating, to_pixels
from .measures import Measures

ImageLike = Scene | Image.Image | torch.Tensor


def encode_decode(tokenizer: IBQModel, pixels: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
    """Pixels `(B, 3, H, W)` in `[-1, 1]` to their codes `(B, h, w)` and the codes' images, clamped to `[-1, 1]`."""
    codes = tokenizer.encode_codes(pixels)
    return codes, tokenizer.decode_codes(codes).sample.clamp(-1, 1)


def reconstruct(tokenizer: IBQModel, images: Iterable[ImageLike], batch_size: int = 32) -> list[Image.Image]:
    """What the tokenizer makes of each image; images as [`evaluate_reconstruction`] takes them."""
    made = []
    with evaluating(tokenizer):
        for batch in batches(images, batch_size):
            made += map(pixels_to_image, encode_decode(tokenizer, _stack(batch, tokenizer))[1])
    return made


def evaluate_reconstruction(
    tokenizer: IBQModel,
    images: Iterable[ImageLike],
    batch_size: int = 8,
    progress: bool = True,
    judges: nn.ModuleDict | None = None,
) -> dict[str, float]:
    """
    Args:
        tokenizer ([`IBQModel`]): The tokenizer.
        images: Scenes, PIL images or tensors of shape `(3, H, W)` in `[-1, 1]`, all of one size, one or more.
        judges (`nn.ModuleDict`, *optional*): Networks for further measures (see [`Measures`]).

    Returns:
        `images`, `psnr` in dB (at most 100), `ssim`, `codebook_usage` (share of all codes that occur), `perplexity` of
        the codes, and `background_shift` (mean distance, a channel, between the median colours of the outermost
        pixels, in 0..255). For scenes also the share of shapes read right in place, colour and kind, `shapes_read`,
        and that of texts, `texts_read`, with `shapes_read_original` and `texts_read_original` for comparison (`None`
        without any). And what `judges` measure.

    Raises:
        ValueError: There is no image, or sizes differ or do not fit the tokenizer.
    """
    measures, reading, shift = Measures(tokenizer.config.num_vq_embeddings, judges=judges), _Reading(), 0.0
    bar = tqdm(desc="Reconstruction", unit=" images", disable=not progress, total=_length(images))
    with evaluating(tokenizer), bar:
        for batch in batches(images, batch_size):
            originals = _stack(batch, tokenizer)
            codes, reconstructions = encode_decode(tokenizer, originals)
            originals = originals.clamp(-1, 1)
            measures.add(originals, reconstructions, codes)
            originals, reconstructions = (originals + 1) / 2, (reconstructions + 1) / 2
            shifts = (_border_colour(originals) - _border_colour(reconstructions)).abs().mean(dim=1)
            shift += 255 * shifts.double().sum().item()
            for image, original, reconstruction in zip(batch, originals, reconstructions, strict=True):
                if isinstance(image, Scene):
                    reading.add(image, original, reconstruction)
            bar.update(len(batch))
    return {**measures.results(), "background_shift": shift / measures.count, **reading.shares()}


class _Reading:
    """Counts what the detector reads right in scenes and in their reconstructions."""

    def __init__(self):
        self.scenes = 0
        self.total = {"shapes": 0, "texts": 0}
        self.right = dict.fromkeys(("shapes_read", "shapes_read_original", "texts_read", "texts_read_original"), 0)

    def add(self, scene: Scene, original: torch.Tensor, reconstruction: torch.Tensor):
        self.scenes += 1
        self.total["shapes"] += len(scene.shapes)
        self.total["texts"] += scene.text is not None
        truth = {(shape.place, shape.color, shape.shape) for shape in scene.shapes}
        for suffix, pixels in (("", reconstruction), ("_original", original)):
            seen = detect(pixels.permute(1, 2, 0).cpu().numpy())
            found = {(shape.place, shape.color, shape.shape) for shape in seen.shapes}
            self.right[f"shapes_read{suffix}"] += len(truth & found)
            self.right[f"texts_read{suffix}"] += scene.text is not None and seen.text == scene.text

    def shares(self) -> dict[str, float | None]:
        if not self.scenes:
            return {}
        totals = {name: self.total[name.split("_")[0]] for name in self.right}
        return {name: right / totals[name] if totals[name] else None for name, right in self.right.items()}


def _stack(batch: list[ImageLike], tokenizer: IBQModel) -> torch.Tensor:
    pixels = [to_pixels(image) for image in batch]
    sizes = sorted({tuple(image.shape[1:]) for image in pixels})
    if len(sizes) > 1:
        raise ValueError(
            f"Images of different sizes (height, width) came together: {sizes}; bring all to one size first, for "
            "instance with ETTImageProcessor."
        )
    return torch.stack(pixels).to(tokenizer.device, tokenizer.dtype)


def _border_colour(pixels: torch.Tensor) -> torch.Tensor:
    """Median colours `(B, 3)` of the outermost pixels of `(B, 3, H, W)`."""
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], dim=-1)
    return border.median(dim=-1).values


def _length(images: Iterable[ImageLike]) -> int | None:
    return len(images) if hasattr(images, "__len__") else None


__all__ = ["encode_decode", "evaluate_reconstruction", "reconstruct"]
