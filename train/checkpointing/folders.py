"""A run's folder: whose it is, whether it is finished, and that one run has it at a time."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ett.common_ett.files import write_json

from ..recipes import NEW_MODEL, Recipe, load_recipe

logger = logging.getLogger(__name__)

RECORD_NAME = "training.json"
WORK_FOLDER = "training"
RECIPE_NAME = "recipe.yaml"
DATA_NAME = "data.json"
LOCK_NAME = ".lock"

FREE_FIELDS = {
    "title",
    *(
        f"training.{name}"
        for name in (
            *("logging_dir", "logging_first_step", "logging_steps", "logging_strategy", "report_to", "run_name"),
            *("disable_tqdm", "log_level", "sample_steps", "save_steps", "save_strategy", "save_total_limit"),
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        )
    ),
}
"""What a run may go on with otherwise than it began, since the result stays the same."""


def check_output_folder(output_dir: Path, recipe: Recipe, resume: bool = True) -> bool:
    """Whether the folder holds this recipe's finished model.

    Raises:
        ValueError: It holds something else, or another recipe's run.
    """
    for path in (output_dir, *output_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"'{path}' is a file; --output-dir must be a folder.")
    if not output_dir.exists() or _is_unused(output_dir):
        return False
    recipe_file = output_dir / WORK_FOLDER / RECIPE_NAME
    if not recipe_file.is_file():
        raise ValueError(
            f"'{output_dir}' holds something else (for instance {min(path.name for path in output_dir.iterdir())}); "
            "choose an empty or new --output-dir."
        )
    differing = differing_fields(load_recipe(str(recipe_file)), recipe)
    if differing:
        raise ValueError(
            f"'{output_dir}' holds a run of another recipe (they differ in {', '.join(differing)}); choose another "
            "--output-dir, or remove that folder."
        )
    finished = (output_dir / RECORD_NAME).is_file()
    if finished and not resume:
        raise ValueError(f"'{output_dir}' holds a finished model; choose another --output-dir, or remove that folder.")
    return finished


def check_data_size(work: Path, unit: str, size: int):
    """
    Args:
        work: Folder of the run that is resumed.
        unit: What the size counts, `samples` or `shards`.
        size: That of the data now.

    Raises:
        ValueError: The data had another size when the run began.
    """
    path = work / DATA_NAME
    begun = json.loads(path.read_text()).get(unit) if path.is_file() else None
    if begun not in (None, size):
        raise ValueError(
            f"The data have {size} {unit}, and had {begun} when the run in '{work.parent}' began; restore the data, "
            "or choose another --output-dir."
        )


def write_data_size(work: Path, unit: str, size: int):
    """Notes the size of the data when a run begins."""
    write_json(work / DATA_NAME, {unit: size})


def _is_unused(folder: Path) -> bool:
    """Whether it is empty, or a run was ended in it before it wrote its recipe."""
    names = {path.name for path in folder.iterdir()}
    return names <= {WORK_FOLDER} and not any((folder / WORK_FOLDER).glob("[!.]*"))


def differing_fields(started: Recipe, wanted: Recipe) -> list[str]:
    """Fields in which two recipes differ, as `training.learning_rate: 0.0001 -> 0.0002`, less those that leave the
    result the same ([`FREE_FIELDS`]; how a stream is shared out depends on the number of workers)."""
    before, after = (_flatten(_normalized(recipe)) for recipe in (started, wanted))
    bound = {"training.dataloader_num_workers"} if wanted.data.streaming else set()
    return [
        f"{name}: {before.get(name, 'not set')} -> {after.get(name, 'not set')}"
        for name in before | after
        if (name not in FREE_FIELDS or name in bound) and before.get(name) != after.get(name)
    ]


def _normalized(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values, with the defaults of a new model. Where an ETT model is loaded, the fields that it decides
    are left out."""
    values = dataclasses.asdict(recipe)
    values["model"] |= {name: recipe.model.of_new(name) for name in NEW_MODEL}
    if recipe.model.path is not None and not recipe.learns.is_of_tokenizer:
        for name in ("image_size", "code_positions", "visual_embedding"):
            values["model"].pop(name)
    return values


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class FolderLock:
    """Within it, no other run works in the folder; the system gives it free when the process ends. A folder that does
    not exist yet is not made before [`~FolderLock.claim`] is called. Of several processes of a run, the first claims.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / LOCK_NAME, timeout=0)

    def claim(self):
        """
        Raises:
            ValueError: Another run has it.
        """
        if self._lock.is_locked or os.environ.get("RANK", "0") != "0":
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process is training in '{self.folder.parent}'; wait for it, or choose another --output-dir."
            ) from None
        except NotImplementedError:
            logger.warning("'%s' is on a disk without locks: see to it that one run writes there.", self.folder)

    def __enter__(self) -> "FolderLock":
        if self.folder.is_dir():
            self.claim()
        return self

    def __exit__(self, *error):
        self._lock.release()


__all__ = [
    "RECIPE_NAME",
    "RECORD_NAME",
    "WORK_FOLDER",
    "FolderLock",
    "check_data_size",
    "check_output_folder",
    "differing_fields",
    "write_data_size",
]
