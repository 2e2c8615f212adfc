"""Folders of models: damaged weights and hostile JSON beside good files."""

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import yaml
from numpy.random import Generator
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ett.modeling_ett.configuration_ett import ETTConfig
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor, ETTProcessor
from ett.train import load_recipe
from ett.train.checkpointing.folders import RECIPE_NAME, RECORD_NAME, WORK_FOLDER

from .calls import copy_model, run_command
from .isolation import Place
from .models import IMAGE_SIZE
from .mutations import hostile_json, mutated, mutated_bytes, pick

RECORD = {
    "kind": "chat",
    "recipe": {"title": "", "task": "caption"},
    "seed": 0,
    "steps": 1,
    "seconds": 1.5,
    "versions": {"torch": "2"},
    "data": "scenes",
    "results": [{"task": "t", "dataset": "d", "split": "s", "metric": "m", "value": 0.5}],
    "parts": {"projector": {"parameters": 1, "trained": True}},
    "history": [{"step": 1, "loss": 1.0}],
    "notes": ["One."],
    "losses": {"loss": 1.0},
}
RECIPE = ["model.path=nothing", "data.source=scenes"]
"""Overrides of the recipe of the finished folder."""


def weights(rng: Generator, place: Place) -> Iterator[None]:
    """Truncated or mutated weights, headers that lie about them, and indexes that lead elsewhere."""
    if rng.random() < 0.15:
        path = place.inputs / "ibq.ckpt"
        path.write_bytes(mutated_bytes(rng, (place.models / "ibq.ckpt").read_bytes()))
        yield
        run_command("convert-tokenizer", path, "converted", "--weights", pick(rng, ("ema", "raw")))
        return
    name = pick(rng, ("ett-chat", "ett-gen", "ett-tokenizer", "shards", "shards"))
    files = sorted(path.name for path in (place.models / name).iterdir() if "safetensors" in path.name)
    changed = pick(rng, files)
    folder = copy_model(place, name, [changed])
    content = (folder / changed).read_bytes()
    if changed.endswith(".json"):
        content = hostile_json(rng, json.loads(content))
    else:
        content = _hostile_header(rng, content) if rng.random() < 0.5 else mutated_bytes(rng, content)
    (folder / changed).write_bytes(content)
    yield from _use(rng, place, folder, changed)


def _hostile_header(rng: Generator, content: bytes) -> bytes:
    """Weights in safetensors whose header says something else of them."""
    length = struct.unpack("<Q", content[:8])[0]
    header = hostile_json(rng, json.loads(content[8 : 8 + length]))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def configs(rng: Generator, place: Place) -> Iterator[None]:
    """JSON files of a model with missing fields, wrong types and hostile values."""
    name = pick(rng, ("ett-chat", "ett-gen", "ett-tokenizer"))
    files = sorted(path.name for path in (place.models / name).iterdir() if path.suffix in (".json", ".jinja"))
    # The two that are of this project, and hold the most that can be wrong, twice as often.
    changed = pick(rng, [*files, *({"config.json", "processor_config.json"} & set(files))])
    folder = copy_model(place, name, [changed])
    content = (folder / changed).read_bytes()
    if changed.endswith(".json"):
        fields = json.loads(content)
        content = hostile_json(rng, fields)
        kind = {name: fields.pop(name) for name in ("model_type", "_class_name") if name in fields}
        changed_fields = mutated(rng, fields)
        # Half of them stay of their kind, since all others are refused for that alone.
        if rng.random() < 0.5 and kind and isinstance(changed_fields, dict):
            content = json.dumps({**changed_fields, **kind}).encode()
    else:
        content = mutated_bytes(rng, content)
    (folder / changed).write_bytes(content)
    yield from _use(rng, place, folder, changed)


def records(rng: Generator, place: Place) -> Iterator[None]:
    """A finished folder whose `training.json` or recipe is hostile, given to `ett train` and `ett export`."""
    folder = place.outputs / "finished"
    (folder / WORK_FOLDER).mkdir(parents=True)
    for path in (place.models / "ett-chat").iterdir():
        (folder / path.name).symlink_to(path)
    record = json.dumps(RECORD).encode()
    recipe = yaml.safe_dump(dataclasses.asdict(load_recipe("stage1_alignment", RECIPE))).encode()
    if rng.random() < 0.7:
        record = hostile_json(rng, RECORD)
    else:
        recipe = mutated_bytes(rng, recipe)
    (folder / RECORD_NAME).write_bytes(record)
    (folder / WORK_FOLDER / RECIPE_NAME).write_bytes(recipe)
    yield
    run_command("train", "stage1_alignment", *RECIPE, "--output-dir", folder)


def _use(rng: Generator, place: Place, folder: Path, changed: str) -> Iterator[None]:
    """Loads a folder in one of the ways in which its kind is loaded and that read the changed file."""
    image = place.inputs / "image.png"
    Image.linear_gradient("L").resize((20, IMAGE_SIZE)).convert("RGB").save(image)
    stage = "stage1_alignment", f"model.path={folder}", "data.source=scenes"
    # By what they read: configuration (c), weights (w), settings of generation (g), processor (p).
    calls: dict[str, list[tuple[str, Callable[[], Any]]]] = {
        "ett-tokenizer": [
            ("cw", lambda: IBQModel.from_pretrained(folder)),
            ("p", lambda: ETTImageProcessor.from_pretrained(folder)),
            ("cwp", lambda: run_command("reconstruct", image, "--model", folder)),
            ("cp", lambda: run_command("export", folder, "exported")),
            ("c", lambda: run_command("train", "demo_tokenizer", f"model.path={folder}", "--dry-run")),
        ],
        "ett-chat": [
            ("c", lambda: ETTConfig.from_pretrained(folder)),
            ("cwg", lambda: ETTForConditionalGeneration.from_pretrained(folder)),
            ("p", lambda: ETTProcessor.from_pretrained(folder)),
            ("cwgp", lambda: run_command("caption", image, "--model", folder, "--max-new-tokens", 2)),
            ("cwp", lambda: run_command("reconstruct", image, "--model", folder)),
            ("cwp", lambda: run_command("export", folder, "exported")),
            ("c", lambda: run_command("train", *stage, "--dry-run")),
            ("p", lambda: run_command("inspect-data", *stage)),
        ],
        "ett-gen": [
            ("cwg", lambda: ETTForConditionalGeneration.from_pretrained(folder)),
            ("p", lambda: ETTProcessor.from_pretrained(folder)),
            ("cwgp", lambda: run_command("draw", "a red circle", "--model", folder, "--output", "drawing.png")),
            ("cwp", lambda: run_command("export", folder, "exported")),
            ("c", lambda: run_command("train", "demo_gen", f"model.path={folder}", "--dry-run")),
        ],
    }
    if _is_ours(folder / "config.json"):
        # Auto classes look into a configuration before a class of this project does.
        calls["ett-tokenizer"].append(("cw", lambda: diffusers.AutoModel.from_pretrained(str(folder))))
        calls["ett-chat"].append(("cwg", lambda: AutoModelForImageTextToText.from_pretrained(folder)))
        calls["ett-chat"].append(("p", lambda: AutoProcessor.from_pretrained(folder)))
    kind = "w" if "safetensors" in changed else {"config.json": "c", "generation_config.json": "g"}.get(changed, "p")
    own = calls["ett-chat" if folder.name == "shards" else folder.name]
    call = pick(rng, [call for reads, call in own if kind in reads])
    yield
    call()


def _is_ours(config: Path) -> bool:
    try:
        fields = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and (fields.get("model_type") == "ett" or fields.get("_class_name") == "IBQModel")


__all__ = ["configs", "records", "weights"]
