"""What a model's folder says that it holds, found out before anything long is done with it."""

import json
from fnmatch import fnmatch
from pathlib import Path

DISCRIMINATOR = "discriminator.safetensors"
"""File that training leaves for the next stage. A model does not need it, so it is published on request only."""

# Training's own files; and weights that would have to be unpickled are never published.
IGNORED = [
    "checkpoint-*",
    "training/*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "runs/*",
    ".*",
    "*.tmp",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    DISCRIMINATOR,
]


def ignored_files(folder: Path, with_discriminator: bool = False) -> list[str]:
    """Patterns of the files of a folder that are not published.

    Raises:
        ValueError: The discriminator is asked for, and the folder has none.
    """
    if not with_discriminator:
        return IGNORED
    require(folder, (folder / DISCRIMINATOR).is_file(), f"no {DISCRIMINATOR}; leave --with-discriminator out")
    return [pattern for pattern in IGNORED if pattern != DISCRIMINATOR]


def read_config(folder: Path) -> dict:
    """The `config.json` of a folder with an ETT model or an IBQ tokenizer, and weights in safetensors.

    Raises:
        ValueError: It is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give the folder of a trained model.")
    require(folder, (folder / "config.json").is_file(), "no config.json, so it is not a model's folder")
    config = read_fields(folder / "config.json")
    found = config.get("model_type") or config.get("_class_name")
    is_ours = found in ("ett", "IBQModel")
    require(folder, is_ours, f"a model of type {found!r:.100}; expected an ETT model or an IBQ tokenizer")
    weights = [path for path in folder.glob("*.safetensors") if not any(fnmatch(path.name, name) for name in IGNORED)]
    require(folder, bool(weights), "no weights in safetensors; save the model with save_pretrained")
    return config


def read_fields(path: Path) -> dict:
    """The fields of a JSON file of a model's folder.

    Raises:
        ValueError: It is no JSON, or holds no mapping.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The {path.name} of {path.parent} is not valid JSON ({error}).") from error
    require(path.parent, isinstance(fields, dict), f"a {path.name} without fields")
    return fields


def require(folder: Path, condition: bool, found: str):
    """Raises `ValueError`, saying what the folder holds, where the condition is not met."""
    if not condition:
        raise ValueError(f"{folder} holds {found}.")


__all__ = ["DISCRIMINATOR", "IGNORED", "ignored_files", "read_config", "read_fields", "require"]
