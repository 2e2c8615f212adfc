"""Datasets of other people: tar shards, tables and their metadata, broken or hostile."""

import csv
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.random import Generator
from PIL import Image

from ett.processing_ett import ETTProcessor
from ett.train import load_recipe
from ett.train.examples import build_examples
from ett.train.run import prepare_examples

from .calls import run_command
from .images import hostile_image
from .isolation import Place
from .models import WORDS
from .mutations import hostile_json, hostile_value, mutated, mutated_bytes, pick

NAMES = (
    *("../../escaped.png", "/tmp/escaped.png", "a/../../b.png", "", ".", "..", ".hidden.png", "x" * 300 + ".png"),
    *("0001.", ".png", "0001.tar.gz", "n\nl.png", "\udcff.png", "con.png", "~/.png", "$(id).png", "0.PNG", "0.json"),
)
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE)
CHAT = [{"from": "human", "value": "<image>\nwhat is the color ?"}, {"from": "gpt", "value": "red"}]
STAGES = {
    "reconstruction": "demo_tokenizer",
    "caption": "stage1_alignment",
    "chat": "lora_chat",
    "drawing": "demo_gen",
    "text": "demo_language",
}


def shards(rng: Generator, place: Place) -> Iterator[None]:
    """Tar files of a webdataset with hostile members, or damaged."""
    path = place.inputs / "shard.tar"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=pick(rng, ("w", "w", "w", "w:gz")), format=pick(rng, (0, 1, 2))) as tar:
        for number in range(rng.integers(1, 5)):
            _add(rng, tar, f"{number:04}.png", _image(rng))
            _add(rng, tar, f"{number:04}.txt", pick(rng, (b"a red circle", b"\xff\xfe\x00", b"", b"a " * 999)))
            if rng.random() < 0.5:
                _add(rng, tar, f"{number:04}.json", hostile_json(rng, {"conversations": CHAT, "text": "a cat"}))
    path.write_bytes(content.getvalue() if rng.random() < 0.5 else mutated_bytes(rng, content.getvalue()))
    yield from _use(rng, place, pick(rng, (path, path, place.inputs)))


def _add(rng: Generator, tar: tarfile.TarFile, name: str, content: bytes):
    member = tarfile.TarInfo(pick(rng, NAMES) if rng.random() < 0.2 else name)
    member.size = len(content)
    if rng.random() < 0.15:
        member.type, member.linkname = pick(rng, LINKS), pick(rng, ("/etc/passwd", "../../escaped", member.name))
    if rng.random() < 0.05:
        member.pax_headers = {"size": pick(rng, ("-1", "9" * 18, "a")), "path": pick(rng, NAMES[:4])}
    for _ in range(2 if rng.random() < 0.1 else 1):
        try:
            tar.addfile(member, io.BytesIO(content))
        except (ValueError, UnicodeError, tarfile.TarError):  # Not every name fits every format of tar.
            continue


def _image(rng: Generator) -> bytes:
    if rng.random() < 0.3:
        return hostile_image(rng, is_small=True)[0]
    content = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def _rows(rng: Generator, place: Place) -> list[dict[str, Any]]:
    """Good rows of every task, with an image beside them, some of which are made hostile."""
    (place.inputs / "0.png").write_bytes(_image(rng))
    good = {"image": "0.png", "text": " ".join(rng.permutation(WORDS[:5])), "messages": CHAT}
    rows = [dict(good) for _ in range(rng.integers(1, 6))]
    if rng.random() < 0.3:
        field, value = pick(rng, list(good)), hostile_value(rng)
        return [{**row, field: value} for row in rows]
    return [mutated(rng, row) if rng.random() < 0.5 else row for row in rows]


def tables(rng: Generator, place: Place) -> Iterator[None]:
    """JSON lines, JSON, CSV and Parquet with wrong types, hostile names and bad encodings, or damaged."""
    rows, kind = _rows(rng, place), pick(rng, ("jsonl", "jsonl", "json", "csv", "parquet", "metadata", "captions"))
    path = place.inputs / f"rows.{kind}"
    if kind == "parquet":
        content = _parquet(rng, rows)
    elif kind == "csv":
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["image", "text", "messages"])
        writer.writerows(_texts(row).values() for row in rows)
        content = table.getvalue().encode(errors="surrogatepass")
    elif kind == "captions":
        path, content = place.inputs / f"0{pick(rng, ('.json', '.txt', '.png.json'))}", json.dumps(rows[0]).encode()
    else:
        lines = [json.dumps(row) for row in rows]
        content = json.dumps(rows).encode() if kind == "json" else "\n".join(lines).encode()
        if kind == "metadata":
            path = place.inputs / "metadata.jsonl"
            content = content.replace(b'"image"', b'"file_name"')
    path.write_bytes(mutated_bytes(rng, content) if rng.random() < 0.4 else content)
    yield from _use(rng, place, path if kind in ("jsonl", "json", "csv", "parquet") else place.inputs)


def _texts(row: Any) -> dict[str, str]:
    """A row of nothing but texts."""
    row = row if isinstance(row, dict) else {"text": row}
    return {name: str(value)[:5000].encode(errors="replace").decode() for name, value in row.items()}


def _parquet(rng: Generator, rows: list[Any]) -> bytes:
    """A table whose description for datasets is often hostile, since datasets believes it."""
    table = pyarrow.Table.from_pylist([_texts(row) for row in rows])
    if rng.random() < 0.6:
        image = {"_type": "Image", "decode": True}
        described = {"info": {"features": {"image": image, "text": {"dtype": "string", "_type": "Value"}}}}
        table = table.replace_schema_metadata({b"huggingface": hostile_json(rng, described)})
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    return content.getvalue()


def _use(rng: Generator, place: Place, source: Path) -> Iterator[None]:
    """Looks at a dataset, or reads its first examples, for one of the tasks."""
    task = pick(rng, list(STAGES))
    is_streamed = rng.random() < 0.5 and task != "text"
    overrides = [f"data.source={source}", f"data.streaming={is_streamed}", "training.max_steps=1"]
    if task == "text":
        overrides.append(f"model.vision_tokenizer={place.models / 'ett-tokenizer'}")
    elif task != "reconstruction":
        overrides.append(f"model.path={place.models / ('ett-gen' if task == 'drawing' else 'ett-chat')}")
    if task not in ("reconstruction", "text"):
        overrides.append("data.max_length=128")
    if rng.random() < 0.2:
        overrides.append("data.filters=[{type: resolution, min_side: 4}, {type: caption_length, max_words: 9}]")
    in_memory = ["data.in_memory=false"]
    calls: tuple[Callable[[], Any], ...] = (
        lambda: run_command("inspect-data", STAGES[task], *overrides, *in_memory, "-n", 3),
        lambda: run_command("inspect-data", STAGES[task], *overrides, *in_memory, "-n", 3),
        lambda: _read(place, STAGES[task], [*overrides, *in_memory]),
        lambda: run_command("train", STAGES[task], *overrides, *in_memory, "--dry-run"),
    )
    call = pick(rng, calls)
    yield
    call()


def _read(place: Place, stage: str, overrides: list[str]):
    recipe = load_recipe(stage, overrides)
    examples = build_examples(recipe, 0)
    if recipe.task in ("text", "reconstruction"):
        read = (example for example, _ in examples.read(0, 1)) if recipe.data.streaming else examples
    else:
        prepared = prepare_examples(recipe, examples, ETTProcessor.from_pretrained(recipe.model.path), 0)
        read = prepared if recipe.data.streaming else map(prepared.__getitem__, range(len(prepared)))
    list(itertools.islice(read, 3))


__all__ = ["shards", "tables"]
