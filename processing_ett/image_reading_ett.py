"""Reads image files, URLs and arrays as RGB images, with limits: sizes are checked before anything is decoded."""

import base64
import binascii
import http.client
import io
import os
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

MAX_IMAGE_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels; Pillow's own threshold for a likely decompression bomb."""

MAX_URL_BYTES = 3 * MAX_IMAGE_PIXELS
"""Largest file that is fetched: as long as the largest image without compression."""

URL_SECONDS = 20
"""Longest silence of an image's URL, and longest time that it may take to send the image."""

# Named so that Pillow never hands an untrusted file to an external program (EPS) or to a seldom-read parser.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

NUMBERS_OF_CHANNELS = (1, 3, 4)
"""Channels that an array of an image may have: grey, RGB, RGB with alpha."""


class ImageError(ValueError):
    """An image that cannot be used, with the reason in one sentence."""


class MissingImageError(ImageError):
    """There is no file of that name."""


def load_image(source: str | Path | bytes | Image.Image, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """
    Opens an image that nobody vouches for, and decodes it whole.

    Args:
        source (`str`, `Path`, `bytes` or `PIL.Image.Image`): A local file, its content, or an image already opened;
            a `str` may also be a URL, or a data URL.
        max_image_pixels (`int`): Width times height above which the image is refused, before it is decoded.

    Returns:
        `PIL.Image.Image`: Of mode RGB, upright (the EXIF orientation is applied), transparency laid over white.

    Raises:
        ImageError: The file is missing, empty, no image, of another format, corrupt, truncated or too large, or a
            URL does not answer.
    """
    return _opened(source, _decode, max_image_pixels)


def read_image_size(
    source: str | Path | bytes | Image.Image, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[int, int]:
    """
    Width and height of an image that nobody vouches for, from its header: as stored, without its EXIF orientation.

    Args and errors are those of [`load_image`], but what is corrupt behind the header goes unnoticed.
    """
    return _opened(source, _checked_size, max_image_pixels)


def _opened(
    source: str | Path | bytes | Image.Image, read: Callable[[Image.Image, str, int], Any], max_image_pixels: int
) -> Any:
    """What `read` makes of the opened image, its name and the limit; no more than the header is read before."""
    if isinstance(source, Image.Image):
        return read(source, "the image", max_image_pixels)
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), "the image", read, max_image_pixels)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _open(io.BytesIO(_fetch(source)), f"'{source}'", read, max_image_pixels)
    if isinstance(source, str) and source.startswith("data:image/"):
        return _open(io.BytesIO(_decode_data_url(source)), "the image in a data URL", read, max_image_pixels)
    if not isinstance(source, (str, Path)):
        raise ImageError(f"Got a value of type {type(source).__name__}; expected an image, its path or URL.")
    path = _checked_path(source)
    return _open(path, f"'{path}'", read, max_image_pixels)


def _checked_path(source: str | Path) -> Path:
    if not str(source).strip():
        raise ImageError("The path of the image is empty; give that of an image file, or a URL.")
    path = Path(source)
    try:
        is_file = path.is_file()
    except OSError as error:  # Such as a name that is too long.
        raise ImageError(f"'{str(path)[:60]}...' cannot be opened as an image ({error.strerror}).") from error
    if not is_file and (same := find_same_name(path)) is not None:
        path, is_file = same, True
    if not is_file:
        if path.is_dir():
            raise ImageError(f"'{path}' is a folder; expected an image file.")
        raise MissingImageError(f"'{path}' is missing; expected an image file.")
    if path.stat().st_size == 0:
        raise ImageError(f"'{path}' is empty; expected an image file.")
    return path


def find_same_name(path: Path) -> Path | None:
    """The file whose name has the same letters in another Unicode form (NFC or NFD, as of macOS), or `None`."""
    if str(path).isascii():
        return None
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not os.path.lexists(found / part):
            try:
                names = os.listdir(found)
            except OSError:
                return None
            letters = unicodedata.normalize("NFC", part)
            part = next((name for name in names if unicodedata.normalize("NFC", name) == letters), None)
            if part is None:
                return None
        found /= part
    return found if os.path.isfile(found) else None


def _decode_data_url(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ImageError(f"The data URL of an image is not valid base64 ({error}).") from error


def _fetch(url: str) -> bytes:
    """What is at a URL, if it is no more than an image may have and comes in the time that it may take."""
    content, end = bytearray(), time.monotonic() + URL_SECONDS
    try:
        with urllib.request.urlopen(url, timeout=URL_SECONDS) as response:
            length = getattr(response, "length", None)
            while (length is None or len(content) < length) and (piece := response.read1(2**16)):
                content += piece
                if max(len(content), length or 0) > MAX_URL_BYTES:
                    raise OSError(f"it has more than {MAX_URL_BYTES} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes longer than {URL_SECONDS} seconds")
            if len(content) < (length or 0):
                raise http.client.IncompleteRead(content, length - len(content))
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise ImageError(
            f"'{url}' cannot be fetched ({reason}); check the address, or give the path of a downloaded image."
        ) from error
    return bytes(content)


def _open(
    file: Path | io.BytesIO, name: str, read: Callable[[Image.Image, str, int], Any], max_image_pixels: int
) -> Any:
    try:
        with warnings.catch_warnings():
            # Pillow warns of a large image here; `_checked_size` refuses it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} is too large: Pillow refuses it as a likely decompression bomb; expected at most "
            f"{max_image_pixels} pixels. Make it smaller."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a format that is read here ({', '.join(FORMATS)}).") from error
    except Exception as error:  # Pillow's parsers raise almost any type on hostile bytes.
        raise ImageError(f"{name} cannot be opened as an image ({error}).") from error
    with image:
        return read(image, name, max_image_pixels)


def _checked_size(image: Image.Image, name: str, max_image_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if 0 in (width, height):
        raise ImageError(f"{name} has no pixels: it is {width} wide and {height} high.")
    if width * height > max_image_pixels:
        raise ImageError(
            f"{name} is too large: {width} x {height} is more than max_image_pixels={max_image_pixels} pixels. "
            "Make it smaller, or raise the limit if you trust it."
        )
    return width, height


def _decode(image: Image.Image, name: str, max_image_pixels: int) -> Image.Image:
    _checked_size(image, name, max_image_pixels)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError as error:
        raise ImageError(f"{name} cannot be used: {error}") from error
    except Exception as error:  # As above: truncated and corrupt data surface only while decoding.
        raise ImageError(f"{name} is corrupt or truncated ({error}).") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        image = array_to_image(np.asarray(image))
    elif image.mode.startswith("I"):
        image = _grey_of_16_bits(image)
    elif image.mode == "La":
        # Grey levels multiplied by alpha, which Pillow converts to one mode alone.
        image = image.convert("LA")
    elif image.mode == "LAB":
        lab, srgb = map(ImageCms.createProfile, ("LAB", "sRGB"))
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    # Pillow clips 16-bit grey to 8 bits instead of scaling it, and drops its transparent level.
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ImageError(
            f"A grey image of integers holds values from {levels.min()} to {levels.max()}; expected 0 to 65535. "
            "Save it with 8 or 16 bits."
        )
    grey = Image.fromarray((levels / 257).round().astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(levels != image.info["transparency"]))
    return grey


def to_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Where the first and the last dimension could both be channels, those of a tensor come first, as everywhere in
    torch, and those of an array last."""
    if isinstance(image, np.ndarray):
        return image
    # NumPy has no bfloat16.
    array = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
    return np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] in NUMBERS_OF_CHANNELS else array


def array_to_image(array: np.ndarray) -> Image.Image:
    """An array `(H, W, C)`, `(C, H, W)` or `(H, W)`, of uint8 in 0..255 or of floats in 0..1, to an image."""
    has_channels_last = array.ndim == 3 and array.shape[-1] in NUMBERS_OF_CHANNELS
    if array.ndim == 3 and array.shape[0] in NUMBERS_OF_CHANNELS and not has_channels_last:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ImageError(f"An array of shape {array.shape} is no image; expected (H, W, C), (C, H, W) or (H, W).")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError(
                f"An image of floats holds values from {array.min()} to {array.max()}; expected 0 to 1, or uint8."
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"An image holds {array.dtype} values; expected uint8 in 0..255 or floats in 0..1.")
    return Image.fromarray(np.ascontiguousarray(array))


__all__ = [
    "MAX_IMAGE_PIXELS",
    "ImageError",
    "MissingImageError",
    "array_to_image",
    "find_same_name",
    "load_image",
    "read_image_size",
    "to_array",
]
