"""Images: damaged files of every format that Pillow writes, alone and among the images of a dataset."""

import base64
import io
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from ett.inference import captions
from ett.processing_ett import ETTImageProcessor, ETTProcessor, ImageError, load_image
from ett.processing_ett.image_reading_ett import read_image_size
from ett.train import load_recipe
from ett.train.examples import build_examples
from ett.train.run import prepare_examples

from .calls import run_command
from .isolation import Place, Wrong
from .models import WORDS
from .mutations import mutated_bytes, pick

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr")
FORMAT_ERRORS = (OSError, KeyError, ValueError, AttributeError, TypeError, RuntimeError)
"""What Pillow raises where a format lacks a mode or an option."""

HUGE = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)


@lru_cache
def writable_formats() -> tuple[tuple[str, str], ...]:
    """Names and suffixes of the formats in which Pillow can write an RGB image here."""
    Image.init()
    found = []
    for suffix, name in sorted(Image.EXTENSION.items()):
        if name in Image.SAVE and name not in dict(found):
            try:
                Image.new("RGB", (8, 8)).save(io.BytesIO(), name)
                found.append((name, suffix))
            except FORMAT_ERRORS:
                continue
    return tuple(found)


def make_image(rng: Generator) -> tuple[bytes, str]:
    """A good image of a random format, mode and size, as the content of a file and its suffix."""
    form, suffix = pick(rng, writable_formats())
    size = tuple(int(side) for side in rng.integers(1, 48, 2))
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(0, 10))
        options["exif"] = exif
    if rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [image] * 3}
    content = io.BytesIO()
    try:
        image.convert(pick(rng, MODES)).save(content, form, **options)
    except FORMAT_ERRORS:  # Not every format has every mode and option.
        content = io.BytesIO()
        image.save(content, form)
    return content.getvalue(), suffix


def _png(width: int, height: int, rows: bytes, mode: int = 2) -> bytes:
    """A PNG whose header says what it likes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _repeat_chunks(rng: Generator, content: bytes) -> bytes:
    """A PNG with some of its chunks several times, in any order."""
    chunks, place = [], 8
    while place + 8 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunks.append(content[place:end])
        place = end
    kept = [pick(rng, chunks) for _ in range(rng.integers(1, 9))]
    return content[:8] + b"".join(chunks[:1] + kept + chunks[-1:])


def hostile_image(rng: Generator, is_small: bool = False) -> tuple[bytes, str]:
    """A damaged image, or a file that pretends to be one, and its suffix. A large one takes seconds to decode."""
    kind = rng.random()
    if kind < 0.1 and not is_small:
        # Many pixels of one colour in few bytes: a little less or more than what is decoded.
        width, height = 8192, int(rng.integers(9000, 13000))
        return _png(width, height, b"\x00" * (width * 3 + 1) * height), ".png"
    if kind < 0.2:
        return _png(pick(rng, HUGE), pick(rng, HUGE), rng.bytes(64), pick(rng, (0, 2, 3, 4, 6, 7))), ".png"
    if kind < 0.25:
        image = io.BytesIO()
        Image.new("RGB", (9, 9)).save(image, "PNG")
        return _repeat_chunks(rng, image.getvalue()), ".png"
    if kind < 0.3:
        text = pick(rng, (b"<svg/>", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0", b"", b"\x00" * 64, rng.bytes(64)))
        return text, pick(rng, (".png", ".jpg", ".tif"))
    content, suffix = make_image(rng)
    return mutated_bytes(rng, content), suffix


def images(rng: Generator, place: Place) -> Iterator[None]:
    """One damaged image, through the readers and the commands that take images."""
    content, suffix = hostile_image(rng)
    path = place.inputs / f"image{suffix if rng.random() < 0.9 else '.png'}"
    path.write_bytes(content)
    model = place.models / "ett-chat"
    calls: tuple[Callable[[], Any], ...] = (
        lambda: load_image(path),
        lambda: load_image(content),
        lambda: load_image("data:image/png;base64," + base64.b64encode(content).decode()),
        lambda: read_image_size(path),
        lambda: ETTImageProcessor(size=16)([str(path)], return_tensors="pt"),
        lambda: captions([str(path)], str(model), max_new_tokens=2),
        lambda: run_command("caption", path, "--model", model, "--max-new-tokens", 2),
        lambda: run_command("ask", path, path, "what is the color ?", "--model", model, "--max-new-tokens", 2),
        lambda: run_command("reconstruct", path, "--model", place.models / "ett-tokenizer"),
        lambda: run_command("reconstruct", path, "--model", place.models / "ett-tokenizer", "--height", 32),
    )
    call = pick(rng, calls)
    yield
    call()


def photos(rng: Generator, place: Place) -> Iterator[None]:
    """A folder of images, some of them damaged: those are skipped, counted and named, and a folder of no others is an
    error."""
    folder = place.inputs / "photos"
    folder.mkdir()
    damaged = rng.random()
    rows = []
    for number in range(rng.integers(1, 7)):
        content, suffix = hostile_image(rng, is_small=True) if rng.random() < damaged else make_image(rng)
        suffix = suffix if suffix in (".png", ".jpg", ".gif", ".webp", ".tif", ".bmp") else ".jpg"
        (folder / f"{number}{suffix}").write_bytes(content)
        rows.append({"file_name": f"{number}{suffix}", "text": " ".join(rng.permutation(WORDS[:5]))})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    way = pick(rng, ("whole", "streamed", "tokenize", "evaluate"))
    place.resumable = way in ("tokenize", "evaluate")
    tokenizer = place.models / "ett-tokenizer"
    yield
    if way == "tokenize":
        run_command("tokenize", folder, "codes", "--model", tokenizer)
    elif way == "evaluate":
        run_command("evaluate", "reconstruction", "--dataset", folder, "--model", tokenizer, "--image-size", 32)
    else:
        _read_all(folder, place.models / "ett-chat", is_streamed=way == "streamed")


def _read_all(folder: Path, model: Path, is_streamed: bool):
    """Reads a folder as a stage of training does, twice, and compares what comes with what can be read."""
    names = {path.name for path in folder.iterdir() if path.suffix != ".jsonl"}
    unreadable = {name for name in names if not _is_readable(folder / name)}
    overrides = [f"data.source={folder}", f"model.path={model}", f"data.streaming={is_streamed}"]
    recipe = load_recipe("stage1_alignment", [*overrides, "training.max_steps=1"])
    prepared = prepare_examples(recipe, build_examples(recipe, 0), ETTProcessor.from_pretrained(model), 0)
    if names == unreadable:
        raise Wrong("A folder of images that cannot be read at all was accepted.")
    count = 2 * len(names)
    items = list(itertools.islice(prepared, count) if is_streamed else map(prepared.__getitem__, range(len(names))))
    skipped = {name for item in items for name in item.get("skipped", ())}
    found = {Path(item["name"]).name for item in items}, {Path(name).name for name in skipped}
    if found != (names - unreadable, unreadable):
        raise Wrong(f"Of {sorted(names)}, {sorted(unreadable)} cannot be read; it read and skipped {found}.")


def _is_readable(path: Path) -> bool:
    try:
        load_image(path)
    except ImageError:
        return False
    return True


__all__ = ["hostile_image", "images", "make_image", "photos"]
