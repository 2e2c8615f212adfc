"""What holds for every image and for every folder of images, whatever their modes, sizes and names."""

import csv
import io
import json
import os
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ett.data_ett.image_rows import open_images, read_rows
from ett.processing_ett import ETTImageProcessor, load_image
from ett.processing_ett.image_processing_ett import FITS, PADDING_COLOUR

SIDES = st.integers(1, 200)
SEEDS = st.integers(0, 2**32 - 1)


def levels_of(seed: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels_of(image, **options) -> torch.Tensor:
    options = {"size": {"height": 24, "width": 32}, **options}
    return ETTImageProcessor(**options)(image, return_tensors="pt").pixel_values


# Modes

PLAIN_MODES = ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr", "HSV")
GREY_MODES = {
    "I;16": (np.uint16, 257),
    "I;16L": (np.uint16, 257),
    "I;16B": (">u2", 257),
    "I": (np.int32, 257),
    "F": (np.float32, 1 / 255),
}
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
MODES = [*PLAIN_MODES, *GREY_MODES, *ALPHA_MODES]


@given(
    seed=SEEDS,
    height=SIDES,
    width=SIDES,
    mode=st.sampled_from([*PLAIN_MODES, *GREY_MODES, *ALPHA_MODES]),
    fit=st.sampled_from(FITS),
)
def test_an_image_of_any_mode_has_the_pixels_of_its_rgb_version(seed, height, width, mode, fit):
    levels = levels_of(seed, height, width, 4)
    image, tolerance = Image.fromarray(levels[..., :3]), 0.0
    if mode in PLAIN_MODES:
        image = image.convert(mode)
        expected = image.convert("RGB")
    elif mode in GREY_MODES:
        dtype, factor = GREY_MODES[mode]
        expected = Image.fromarray(levels[..., 0]).convert("RGB")
        grey = (levels[..., 0].astype(float) * factor).astype(dtype)
        image = Image.frombytes(mode, (width, height), grey.tobytes())
    else:
        image = with_alpha(levels, mode)
        shown = np.asarray(image.convert("LA" if mode == "La" else "RGBA").convert("RGBA")).astype(float)
        over_white = 255 + (shown[..., :3] - 255) * shown[..., 3:] / 255
        expected = Image.fromarray(over_white.round().astype(np.uint8))
        # Blending and resizing round to whole levels.
        tolerance = 4 / 127.5
    assert image.mode == mode
    torch.testing.assert_close(pixels_of(image, fit=fit), pixels_of(expected, fit=fit), rtol=0, atol=tolerance)


def with_alpha(levels: np.ndarray, mode: str) -> Image.Image:
    alpha = Image.fromarray(levels[..., 3])
    if mode in ("LA", "La"):
        grey = Image.fromarray(levels[..., 0])
        grey.putalpha(alpha)
        return grey.convert(mode)
    if mode == "PA":
        palette = Image.fromarray(levels[..., :3]).convert("P")
        palette.putalpha(alpha)
        return palette
    return Image.fromarray(levels, "RGBA").convert(mode)


# Arrays


@given(
    seed=SEEDS,
    height=SIDES,
    width=SIDES,
    channels=st.sampled_from([None, 1, 3, 4]),
    is_tensor=st.booleans(),
    channels_first=st.booleans(),
    dtype=st.sampled_from(["uint8", "float16", "float32", "float64", "bfloat16"]),
    fit=st.sampled_from(FITS),
)
def test_an_array_of_any_layout_has_the_pixels_of_its_rgb_version(
    seed, height, width, channels, is_tensor, channels_first, dtype, fit
):
    is_tensor = is_tensor or dtype == "bfloat16"
    # Where a shape may be of either layout, it is the usual one.
    channels_first = is_tensor if (height if is_tensor else width) in (1, 3, 4) else channels_first
    levels = levels_of(seed, height, width, channels or 1)
    if channels == 4:
        levels[..., 3] = 255
    expected = Image.fromarray(np.repeat(levels, 3, axis=-1) if levels.shape[-1] == 1 else levels[..., :3].copy())
    array = levels if dtype == "uint8" else (levels / 255).astype("float32" if dtype == "bfloat16" else dtype)
    if channels is None:
        array = array[..., 0]
    elif channels_first:
        array = np.moveaxis(array, -1, 0)
    if is_tensor:
        array = torch.from_numpy(array.copy())
        array = array.bfloat16() if dtype == "bfloat16" else array
    # bfloat16 has 8 bits, so a level may be its neighbour.
    tolerance = 3 / 127.5 if dtype == "bfloat16" else 0.0
    torch.testing.assert_close(pixels_of(array, fit=fit), pixels_of(expected, fit=fit), rtol=0, atol=tolerance)


# Orientation

UPRIGHT = {
    1: lambda levels: levels,
    2: np.fliplr,
    3: lambda levels: np.rot90(levels, 2),
    4: np.flipud,
    5: lambda levels: levels.swapaxes(0, 1),
    6: lambda levels: np.rot90(levels, -1),
    7: lambda levels: np.rot90(levels, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""What makes an image upright, by its EXIF orientation."""


@given(
    seed=SEEDS,
    height=SIDES,
    width=SIDES,
    orientation=st.sampled_from(list(UPRIGHT)),
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]),
)
def test_an_image_of_any_orientation_comes_upright(seed, height, width, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(levels_of(seed, height, width, 3))
    stored, turned = io.BytesIO(), io.BytesIO()
    image.save(stored, form)
    image.save(turned, form, exif=exif)
    expected = UPRIGHT[orientation](np.asarray(load_image(stored.getvalue())))
    np.testing.assert_array_equal(np.asarray(load_image(turned.getvalue())), expected)


# Fit


@given(seed=SEEDS, height=SIDES, width=SIDES, to_height=SIDES, to_width=SIDES, fit=st.sampled_from(FITS))
def test_every_fit_keeps_range_shape_and_what_is_even(seed, height, width, to_height, to_width, fit):
    size = {"height": to_height, "width": to_width}
    levels = levels_of(seed, height, width, 3)
    pixels = pixels_of(Image.fromarray(levels), size=size, fit=fit)
    assert pixels.shape == (1, 3, to_height, to_width) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    colour = tuple(levels[0, 0].tolist())
    image = ETTImageProcessor(size=size, fit=fit)
    (shown,) = image.post_process(image(Image.new("RGB", (width, height), colour), return_tensors="pt").pixel_values)
    colours = {found for _, found in shown.getcolors(maxcolors=2)}
    assert colour in colours and colours <= {colour, *([PADDING_COLOUR] if fit == "pad" else [])}


# Folders

WORDS = (
    *("train", "test", "val", "dev", "eval", "validation", "training", "data", "images"),
    *("metadata", "config", "state", "README", "dataset_info", "dataset_dict", "a", "1"),
)
NAMES = st.one_of(
    st.sampled_from(WORDS),
    st.builds("{}{}{}".format, st.sampled_from(WORDS), st.sampled_from(" -_.[]()"), st.sampled_from(WORDS)),
    st.text(st.sampled_from("ab1 .,;:!?*[](){}&#%+=~^$@'\"-_äéÅ猫é🐈ك\u0301"), min_size=1, max_size=8),
).filter(lambda name: not name.startswith(".") and not name.endswith("."))
FORMS = st.sampled_from(["NFC", "NFD"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def layouts(draw) -> dict[str, tuple[str, str]]:
    """Captions and forms of caption files by the paths of images, one of which lies in the dataset's own folder."""
    folders = [[], *draw(st.lists(st.lists(NAMES, max_size=2), max_size=2))]
    paths = {}
    for number, name in enumerate(draw(st.lists(NAMES, max_size=6))):
        path = "/".join(
            [*folders[number % len(folders)], f"{name}{draw(st.sampled_from(['.png', '.PNG', '.jpg', '.webp']))}"]
        )
        path = unicodedata.normalize(draw(FORMS), path)
        paths[unicodedata.normalize("NFC", os.path.splitext(path)[0])] = path
    paths[""] = "at the top.png"
    return {path: draw(TEXTS) for path in paths.values()}


def write_images(folder: Path, paths) -> dict[str, tuple[int, int, int]]:
    """Images of one colour each, by which they are told apart."""
    colours = {}
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        colours[path] = (16 * number, 0, 0)
        Image.new("RGB", (2, 2), colours[path]).save(folder / path, "PNG")
    return colours


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def captions_in(folder: str, streaming: bool) -> dict[tuple[int, int, int], str | None]:
    rows = read_rows(folder, "train", streaming).cast_column("image", datasets.Image(decode=False))
    rows = list(rows)
    found = {open_images(row["image"])[0].getpixel((0, 0)): row.get("text") for row in rows}
    assert len(found) == len(rows)
    return found


@given(layout=layouts(), streaming=st.booleans(), data=st.data())
def test_every_image_of_a_folder_has_the_caption_beside_it(cache, layout, streaming, data):
    with TemporaryDirectory(prefix="photos [1] ") as folder:
        colours, expected = write_images(Path(folder), layout), {}
        for path, text in layout.items():
            stem, form = os.path.splitext(path)[0], data.draw(st.sampled_from([None, "txt", "json", "jpg.json"]))
            expected[colours[path]] = None if form is None else text.strip() if form == "txt" else text
            if form == "txt":
                (Path(folder) / f"{stem}.txt").write_bytes(text.encode())
            elif form == "json":
                (Path(folder) / f"{stem}.json").write_text(json.dumps({"text": text}))
            elif form == "jpg.json":
                (Path(folder) / f"{path}.json").write_text(json.dumps({"text": text}))
        assert captions_in(folder, streaming) == expected


@given(layout=layouts(), streaming=st.booleans(), form=FORMS, kind=st.sampled_from(["jsonl", "csv", "parquet"]))
def test_every_image_of_a_folder_has_the_caption_of_its_metadata(cache, layout, streaming, form, kind):
    with TemporaryDirectory(prefix="photos [1] ") as folder:
        if kind == "csv":
            # pandas reads `NA` and its like as nothing and a column of digits as numbers.
            layout = {path: f"a {text}" for path, text in layout.items()}
        colours = write_images(Path(folder), layout)
        rows = [{"file_name": unicodedata.normalize(form, path), "text": text} for path, text in layout.items()]
        path = Path(folder) / f"metadata.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["file_name", "text"])
                writer.writeheader()
                writer.writerows(rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(path)
        assert captions_in(folder, streaming) == {colours[path]: text for path, text in layout.items()}
