"""Uploads a model's folder to the Hub."""

import json
import os
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

# Training's own files; and weights that would have to be unpickled are never published.
IGNORED = [
    "checkpoint-*",
    "training/*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "runs/*",
    "training/*",
    ".*",
    "*.tmp",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
]


def push_folder(folder: str | os.PathLike, repo_id: str, private: bool = False) -> str:
    """Uploads a model's folder, without checkpoints and optimizers, to a repository that is made where there is none.

    Args:
        folder: A folder with `config.json`, safetensors and a model card, such as training leaves.
        repo_id: `name` or `owner/name` on the Hub.
        private: Whether a new repository is private.

    Returns:
        The address of the upload's commit.

    Raises:
        ValueError: The folder is not a complete model folder.
        ConnectionError: The Hub is out of reach, or refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} to push; give the folder of a trained model.")
    _require(folder, (folder / "config.json").is_file(), "no config.json, so it is not a model's folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / 'config.json'} is not valid JSON ({error}), so {folder} is not pushed."
        ) from error
    found = config.get("model_type") or config.get("_class_name") if isinstance(config, dict) else None
    _require(
        folder, found in ("ett", "IBQModel"), f"a model of type {found!r}; ett pushes ETT models and IBQ tokenizers"
    )
    weights = [path for path in folder.glob("*.safetensors") if not any(fnmatch(path.name, name) for name in IGNORED)]
    _require(folder, bool(weights), "no weights in safetensors; save the model with save_pretrained")
    _require(folder, (folder / "README.md").is_file(), "no model card (README.md); hub_cards.write_card writes one")

    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.resolve().name}",
            ignore_patterns=IGNORED,
        )
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"Hugging Face libraries are set to work offline, so {folder} was not pushed; unset HF_HUB_OFFLINE."
        ) from error
    except HTTPError as error:
        raise ConnectionError(f"The upload of {folder} to {repo_id} failed: {error}") from error
    return commit.commit_url


def _require(folder: Path, condition: bool, found: str):
    if not condition:
        raise ValueError(f"{folder} holds {found}.")


__all__ = ["IGNORED", "push_folder"]
