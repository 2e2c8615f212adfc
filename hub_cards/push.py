"""Uploads a model's folder to the Hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from .folders import ignored_files, read_config, require


def push_folder(
    folder: str | os.PathLike, repo_id: str, private: bool = False, with_discriminator: bool = False
) -> str:
    """Uploads a model's folder, without checkpoints and optimizers, to a repository that is made where there is none.

    Args:
        folder: A folder with `config.json`, safetensors and a model card, such as training leaves.
        repo_id: `name` or `owner/name` on the Hub.
        private: Whether a new repository is private.
        with_discriminator: Upload `discriminator.safetensors`, too, from which others can continue training.

    Returns:
        The address of the upload's commit.

    Raises:
        ValueError: The folder is not a complete model folder, or lacks the discriminator that is asked for.
        ConnectionError: The Hub is out of reach, or refuses.
    """
    folder = Path(folder)
    read_config(folder)
    require(folder, (folder / "README.md").is_file(), "no model card (README.md); hub_cards.write_card writes one")
    ignored = ignored_files(folder, with_discriminator)

    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.resolve().name}",
            ignore_patterns=ignored,
        )
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"Hugging Face libraries are set to work offline, so {folder} was not pushed; unset HF_HUB_OFFLINE."
        ) from error
    except HTTPError as error:
        raise ConnectionError(f"The upload of {folder} to {repo_id} failed: {error}") from error
    return commit.commit_url


__all__ = ["push_folder"]
