"""Images in, pixels of a fixed size in [-1, 1] out, and back to images."""

import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.utils import TensorType

from .image_reading_ett import MAX_IMAGE_PIXELS, array_to_image, load_image, to_array

LONGEST_REASON = 300
"""Characters that are quoted of another library's message."""


@contextmanager
def one_sentence(subject: str) -> Iterator[None]:
    """
    Within it, what libraries raise on damaged or hostile files becomes a `ValueError` of one sentence, which begins
    with the `subject`. Errors of files that cannot be opened (`OSError`) pass, and sentences of a plain `ValueError`.
    """
    try:
        yield
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # Almost any type; tokenizers raises no other than `Exception`.
        reason = " ".join(str(error).split())
        if type(error) is ValueError and reason == str(error) and len(reason) <= LONGEST_REASON:
            raise
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}..."
        raise ValueError(f"{subject} cannot be used ({type(error).__name__}: {reason}).") from error


def height_and_width(size: Any) -> SizeDict:
    """
    Args:
        size (`int`, `(int, int)`, `dict` or `SizeDict`): A side of a square, or a height and a width, in pixels.

    Raises:
        ValueError: It is none of these, or no size that an image can have.
    """
    given = dict(size) if isinstance(size, SizeDict) else size
    sides = [given, given] if isinstance(given, numbers.Integral) else given
    if isinstance(given, dict):
        sides = [given["height"], given["width"]] if given.keys() == {"height", "width"} else None
    is_pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    if not is_pair or not all(isinstance(side, numbers.Integral) and side > 0 for side in sides):
        raise ValueError(
            f"size is {given!r:.100}; expected a 'height' and a 'width', both in whole pixels and at least 1."
        )
    if sides[0] * sides[1] > MAX_IMAGE_PIXELS:
        raise ValueError(f"size is {given!r:.100}; expected at most {MAX_IMAGE_PIXELS} pixels in all.")
    return SizeDict(height=int(sides[0]), width=int(sides[1]))


FITS = ("crop", "pad", "stretch")
"""Ways to bring an image to another shape."""

PADDING_COLOUR = (128, 128, 128)
"""RGB levels of the borders that `fit="pad"` adds: nearly 0 in `[-1, 1]`."""


def fit_image(image: Image.Image, size: tuple[int, int], fit: str, resample: int) -> Image.Image:
    """
    Brings an image to a size.

    Args:
        size (`(int, int)`): Width and height, in pixels.
        fit (`str`): `crop` resizes the image to just cover the size and cuts the rest off around the centre; `pad`
            resizes the whole image to just fit in and adds grey borders of equal width; `stretch` changes its shape.
        resample (`int`): Pillow's resampling filter.

    Raises:
        ValueError: `fit` is none of these.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; expected one of {', '.join(FITS)}.")
    if fit == "crop":
        return ImageOps.fit(image, size, resample)
    if fit == "stretch":
        return image.resize(size, resample)
    scale = min(size[0] / image.width, size[1] / image.height)
    # A side of a very thin image would round to 0.
    inner = tuple(min(max(1, round(side * scale)), limit) for side, limit in zip(image.size, size, strict=True))
    padded = Image.new("RGB", size, PADDING_COLOUR)
    padded.paste(image.resize(inner, resample), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return padded


def _check_options(options: dict[str, Any]):
    fit, resample, limit = (options.get(name) for name in ("fit", "resample", "max_image_pixels"))
    if fit is not None and fit not in FITS:
        raise ValueError(f"fit is {fit!r:.100}; expected one of {', '.join(FITS)}.")
    if resample is not None and resample not in list(PILImageResampling):
        raise ValueError(f"resample is {resample!r:.100}; expected the number of one of Pillow's filters, 0 to 5.")
    if limit is not None and (not isinstance(limit, numbers.Integral) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"max_image_pixels is {limit!r:.100}; expected a whole number above 0.")


class ETTImageProcessorKwargs(TypedDict, total=False):
    """What can be set; the rest of transformers' options would only take the pixels out of `[-1, 1]` or of `size`."""

    size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict | None
    resample: int | None
    fit: str | None
    max_image_pixels: int | None
    return_tensors: str | TensorType | None


class ETTImageProcessor(PilBackend):
    r"""
    Makes images of any size and mode into pixels of one size in `[-1, 1]`.

    An image (`PIL.Image.Image`, array, tensor, local path or URL) becomes RGB, upright, over white; is resized and
    cropped, padded or stretched to exactly `size`, as `fit` says; and is rescaled to `[-1, 1]`. Arrays and tensors are
    `(H, W, C)`, `(C, H, W)` or `(H, W)`; where a shape may be either of the first two, channels are the last dimension
    of an array and the first of a tensor.

    Args:
        size (`int`, `(int, int)` or `dict`, defaults to `{"height": 512, "width": 512}`): Height and width, in pixels.
        resample (`int`, defaults to bicubic): Pillow's resampling filter.
        fit (`str`, defaults to `"crop"`): `crop`, `pad` or `stretch`; see [`fit_image`]. Cropping cuts the sides off
            wide images, which an answer may depend on; padding keeps all of an image at a lower resolution.
        max_image_pixels (`int`, defaults to 89478485): Images with more pixels are refused before they are decoded.

    Called with one image or a list, returns a `BatchFeature` with `pixel_values` of shape
    `(num_images, 3, height, width)`.

    Raises:
        ImageError: An image cannot be read, is empty or too large, or an array is not in 0..255 or 0..1.
        ValueError: `size` is no height and width, `fit` is none of the three, or another value is out of range.
    """

    valid_kwargs = ETTImageProcessorKwargs
    size = {"height": 512, "width": 512}
    resample = PILImageResampling.BICUBIC
    fit = "crop"
    max_image_pixels = MAX_IMAGE_PIXELS
    rescale_factor = None

    def __init__(self, **kwargs):
        # Files set options. Anything else by the name of a method would take its place.
        super().__init__(
            **{
                name: value
                for name, value in kwargs.items()
                if name in self.valid_kwargs.__annotations__ or not hasattr(type(self), name)
            }
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As in transformers, but for its errors.

        Raises:
            OSError: There is no such folder or repository, or a file is missing in it.
            ValueError: A file is damaged, or a value in it is out of range.
        """
        with one_sentence(f"The image processor of '{pretrained_model_name_or_path}'"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _standardize_kwargs(self, size, **kwargs) -> dict:
        _check_options(kwargs)
        return super()._standardize_kwargs(**kwargs, size=height_and_width(size))

    def preprocess(self, images, *args, size=None, **kwargs) -> BatchFeature:
        # Before transformers sees it, whose error is of many lines.
        size = dict(height_and_width(self.size if size is None else size))
        return super().preprocess(images, *args, size=size, **kwargs)

    def fetch_images(self, images):
        """Opens what is given as a path, URL or base64 data; images, arrays and tensors pass through."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (np.ndarray, torch.Tensor)):
            # Transformers takes no array of two dimensions.
            return array_to_image(to_array(images)) if images.ndim == 2 else images
        if isinstance(images, Image.Image):
            return images
        return load_image(images, self.max_image_pixels)

    def process_image(self, image, max_image_pixels: int = MAX_IMAGE_PIXELS, **kwargs) -> Image.Image:
        if isinstance(image, (np.ndarray, torch.Tensor)):
            image = array_to_image(to_array(image))
        return load_image(image, max_image_pixels)

    def _preprocess(
        self,
        images: list[Image.Image],
        size: SizeDict,
        resample: int,
        fit: str = "crop",
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        fitted = [fit_image(image, (size.width, size.height), fit, resample) for image in images]
        pixels = [np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1 for image in fitted]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def post_process(self, pixels: torch.Tensor) -> list[Image.Image]:
        """
        Args:
            pixels (`torch.Tensor` of shape `(num_images, 3, height, width)`): In `[-1, 1]`; the rest is clamped.

        Returns:
            `list[PIL.Image.Image]`: One RGB image for each.

        Raises:
            ValueError: `pixels` has another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels has shape {tuple(pixels.shape)}; expected (num_images, 3, height, width).")
        levels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image.numpy()) for image in levels.permute(0, 2, 3, 1).contiguous()]


__all__ = ["FITS", "PADDING_COLOUR", "ETTImageProcessor", "fit_image", "height_and_width", "one_sentence"]
