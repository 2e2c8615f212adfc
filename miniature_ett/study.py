"""The study: Tables 4 and 5 of the ETT paper at miniature scale, with seeds, intervals and controls.

- [`miniature_ett.study_matrix`] holds the matrix. Each cell of it is measured once and leaves one small JSON file.
- Cells of a ground and seed share the tokenizer and the language model. A killed study goes on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ett
from ett import train
from ett.train.checkpointing.folders import WORK_FOLDER, FolderLock

from .schedule import Outcome, StopTasks, Task, run_tasks
from .study_matrix import (
    ARMS,
    MEASURING,
    MEASURING_SECONDS,
    QUICK_MEASURING,
    SHARED,
    STAGES,
    Cell,
    chain,
    choose_cells,
    constant_overrides,
    stage_folder,
    stage_overrides,
)
from .study_report import write_study
from .study_tasks import draw_sheet, extract_tokenizer, full_disk_sentence, measure_cell, train_stage, write_cell

FINAL = ("done", "diverged", "skipped")
"""Statuses of cells that a further run leaves as they are. A failed cell is tried again."""
DIVERGENCE = "NonFiniteLossError"
STUDY_NAME = "study.json"
CELLS_FOLDER = "cells"
SHEETS_FOLDER = "sheets"
REPORT_FOLDER = "report"
SHEET_ARM = "alpha-0.25"


@dataclass(frozen=True)
class StudySummary:
    """What a run of the study left: the report's page, and the number of cells by status."""

    page: Path
    statuses: dict[str, int]


def run_study(
    output_dir: Path = Path("ett-study"),
    grounds: Sequence[str] = (),
    seeds: int | None = None,
    processes: int | None = None,
    only: Sequence[str] = (),
    quick: bool = False,
    known: Path | None = None,
) -> StudySummary:
    """Trains and measures every cell that is not there yet, and reports all of them.

    Args:
        output_dir: Receives `study.json` (settings), `cells/`, `report/` and a folder of models for each ground and
            seed.
        grounds: Some of [`study_matrix.SEEDS`]; by default all.
        seeds: Number of seeds of every arm and ground; by default those of `SEEDS` and `CONTROL_SEEDS`.
        processes: Number of worker processes, each with one thread; by default the number of cores.
        only: Some of [`study_matrix.ARMS`]; by default all.
        quick: A few steps of every stage, to see that all runs. The figures mean nothing.
        known: A results file, such as `docs/study/results.json`. What it holds is not run again.

    Raises:
        ValueError: An argument is unknown, or the folder holds something else, or it or `known` is of a study of other
            settings.
        OSError: A file could not be written, for instance since the disk is full. The same call goes on.
    """
    output_dir = Path(output_dir)
    cells = choose_cells(grounds, seeds, only, quick)
    settings = describe_settings({cell.arm for cell in cells}, quick)
    results = read_results(known, settings) if known else {"cells": {}}
    check_folder(output_dir, settings)
    check_stage_folders(output_dir, cells, quick)
    with FolderLock(output_dir / CELLS_FOLDER) as lock:
        lock.claim()
        settings = start_folder(output_dir, settings)
        adopt_cells(results, output_dir, cells, settings)
        recorder = Recorder(output_dir, cells, settings)
        unfinished = [cell for cell in cells if not recorder.is_final(cell)]
        tasks, done = build_tasks(unfinished, output_dir, quick, settings)
        try:
            run_tasks(tasks, processes, done, on_end=recorder.record, log=output_dir / "study.log")
        except StopTasks as error:
            raise OSError(str(error)) from error
        page = report_study(output_dir, output_dir / REPORT_FOLDER)
        statuses = [recorder.status(cell) for cell in cells]
    return StudySummary(page, {status: statuses.count(status) for status in sorted(set(statuses), key=str)})


def report_study(output_dir: Path, docs: Path) -> Path:
    """Gathers the cells of a study's folder into `docs/study/results.json` and writes tables and figures from it.

    Cells that the file holds already, of a study of the same settings, are kept. Without a study's folder the report
    is written from the file alone.

    Returns:
        The report, `docs/study.md`.

    Raises:
        ValueError: There are neither cells nor a results file, or a cell is of other settings than its folder.
    """
    output_dir, docs = Path(output_dir), Path(docs)
    results_file = docs / "study" / "results.json"
    committed = read_json(results_file) if results_file.is_file() else None
    if not (output_dir / STUDY_NAME).is_file():
        if committed is None:
            raise ValueError(
                f"There is neither a study in '{output_dir}' nor '{results_file}'; run `ett study` first."
            )
        return write_study(committed, docs)
    settings = read_json(output_dir / STUDY_NAME)
    if settings["quick"] and docs != output_dir / REPORT_FOLDER:
        raise ValueError(
            f"'{output_dir}' holds a quick run, whose figures mean nothing; its report is in "
            f"'{output_dir / REPORT_FOLDER}'. Give --output-dir a full run."
        )
    cells = read_cells(output_dir, settings)
    versions = [cell["versions"] for cell in cells.values() if "versions" in cell]
    cells = {
        name: {field: value for field, value in cell.items() if field not in ("fingerprint", "versions")}
        for name, cell in cells.items()
    }
    if committed is not None and not differing_settings(committed["settings"], settings):
        cells = committed["cells"] | cells
        versions = committed["versions"] + versions
        settings["stages"] = committed["settings"]["stages"] | settings["stages"]
    versions = [each for number, each in enumerate(versions) if each not in versions[:number]]
    sheets = {path.stem: path for path in sorted((output_dir / SHEETS_FOLDER).glob("*.png"))}
    return write_study(
        {"settings": settings, "versions": versions, "cells": dict(sorted(cells.items()))}, docs, sheets
    )


# Settings


def describe_settings(arms: set[str], quick: bool) -> dict[str, Any]:
    """What the results depend on, beside ground and seed: the version, what is measured, and the arms' recipes, as far
    as their fields differ from the defaults."""
    stages, defaults = {}, dataclasses.asdict(train.Recipe())
    for name in dict.fromkeys(
        stage for arm in ARMS if arm in arms for stage in chain(list(ARMS[arm].stages.values()))
    ):
        stage = STAGES[name]
        recipe = {}
        if stage.recipe is not None:
            recipe = dataclasses.asdict(train.load_recipe(stage.recipe, constant_overrides(stage, "mixed", quick)))
            recipe = _without_defaults(recipe, defaults)
        stages[name] = {"recipe": recipe, "start": stage.start, "seed_offset": stage.seed_offset}
    measuring = QUICK_MEASURING if quick else MEASURING
    # Tuples become lists, as in the file that these are compared with.
    settings = {"version": ett.__version__, "quick": quick, "measuring": measuring, "stages": stages}
    return json.loads(json.dumps(settings))


def _without_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _without_defaults(value, default), {}
        if value != default:
            kept[name] = value
    return kept


def differing_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Fields in which two studies differ, as `field: before -> after`. A stage that one of them lacks is no
    difference, since a study may grow by arms."""
    if before["version"] != after["version"]:
        return [f"version: {before['version']} -> {after['version']}"]
    if before["quick"] != after["quick"]:
        return [f"quick: {before['quick']} -> {after['quick']}"]
    common = before["stages"].keys() & after["stages"].keys()
    one, other = (
        _flatten(
            {"measuring": study["measuring"], "stages": {name: study["stages"][name] for name in sorted(common)}}, ""
        )
        for study in (before, after)
    )
    return [
        f"{name}: {one.get(name, 'not set')} -> {other.get(name, 'not set')}"
        for name in one | other
        if one.get(name, "not set") != other.get(name, "not set")
    ]


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def fingerprint(arm: str, settings: dict[str, Any]) -> str:
    """Of the settings that an arm's figures depend on: 16 hexadecimal digits."""
    stages = {name: settings["stages"][name] for name in chain(list(ARMS[arm].stages.values()))}
    text = json.dumps([settings["version"], settings["measuring"], stages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Folders


def check_folder(output_dir: Path, settings: dict[str, Any]):
    """Raises `ValueError` where the folder holds something else than a study, or one of other settings."""
    for path in (output_dir, *output_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"'{path}' is a file; --output-dir must be a folder.")
    study = output_dir / STUDY_NAME
    if study.is_file():
        if differing := differing_settings(read_json(study), settings):
            shown = "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
            raise ValueError(
                f"'{output_dir}' holds a study of other settings (they differ in {shown}); choose another "
                "--output-dir, or remove that folder."
            )
    elif output_dir.is_dir() and (names := {path.name for path in output_dir.iterdir()} - {CELLS_FOLDER}):
        raise ValueError(
            f"'{output_dir}' holds something else (for instance {min(names)}); choose an empty or new --output-dir."
        )


def check_stage_folders(output_dir: Path, cells: list[Cell], quick: bool):
    """Raises `ValueError` where a stage's folder holds something else than the stage, before any long work."""
    for cell in cells:
        for name in ARMS[cell.arm].stages.values():
            folder = stage_folder(output_dir, cell, name)
            if STAGES[name].recipe is not None and folder.exists():
                recipe = train.load_recipe(STAGES[name].recipe, stage_overrides(name, cell, output_dir, quick))
                train.check_output_folder(folder, recipe)


def start_folder(output_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes the settings into the folder, beside those of arms that are there already. Returns all of them."""
    study = output_dir / STUDY_NAME
    stages = read_json(study)["stages"] if study.is_file() else {}
    settings = {**settings, "stages": stages | settings["stages"]}
    for name in (CELLS_FOLDER, SHEETS_FOLDER):
        (output_dir / name).mkdir(exist_ok=True)
    _write(study, settings)
    return settings


def cell_file(output_dir: Path, cell: Cell) -> Path:
    return output_dir / CELLS_FOLDER / f"{cell.name}.json"


def is_trained(folder: Path, stage: str) -> bool:
    """Whether a stage's folder is finished. A stage removes its checkpoints last, so one that has some is not."""
    name = "config.json" if STAGES[stage].recipe is None else train.RECORD_NAME
    return (folder / name).is_file() and not any((folder / WORK_FOLDER).glob("checkpoint-*"))


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: The file cannot be read as a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' cannot be read ({error}); remove it and run again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds no JSON object; remove it and run again.")
    return value


def read_cells(output_dir: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All cells of a folder by name.

    Raises:
        ValueError: A cell cannot be read, or is of other settings.
    """
    cells = {}
    for path in sorted((output_dir / CELLS_FOLDER).glob("*.json")):
        cell = read_json(path)
        if cell.get("arm") not in ARMS or cell.get("fingerprint") != fingerprint(cell["arm"], settings):
            raise ValueError(
                f"'{path}' is a cell of other settings or of another version than '{output_dir / STUDY_NAME}' says; "
                "remove it and run again."
            )
        cells[path.stem] = cell
    return cells


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A results file of [`report_study`].

    Raises:
        ValueError: It is not there, cannot be read, or is of a study of other settings.
    """
    if not path.is_file():
        raise ValueError(f"There is no results file '{path}'; expected one such as docs/study/results.json.")
    results = read_json(path)
    if not {"settings", "cells"} <= results.keys():
        raise ValueError(f"'{path}' is no results file of a study; expected one such as docs/study/results.json.")
    if differing := differing_settings(results["settings"], settings):
        raise ValueError(f"'{path}' is of a study of other settings (they differ in {differing[0]}); leave it out.")
    return results


def adopt_cells(results: dict[str, Any], output_dir: Path, cells: list[Cell], settings: dict[str, Any]):
    """Writes the files of cells that a results file holds and the folder lacks."""
    for cell in cells:
        path, measured = cell_file(output_dir, cell), results["cells"].get(cell.name)
        if measured and measured["status"] in FINAL and not path.is_file():
            _write(path, describe_cell(cell, settings) | measured)


def _write(path: Path, value: dict[str, Any]):
    try:
        write_cell(path, value)
    except OSError as error:
        raise OSError(full_disk_sentence(path, error)) from error


# Tasks


def build_tasks(
    cells: list[Cell], output_dir: Path, quick: bool, settings: dict[str, Any]
) -> tuple[list[Task], set[str]]:
    """The tasks that these cells need, and the names of those that an earlier run finished."""
    tasks: dict[str, Task] = {}
    done = set()
    for cell in cells:
        arm = ARMS[cell.arm]
        for name in chain(list(arm.stages.values())):
            task = build_stage_task(name, cell, output_dir, quick)
            tasks[task.name] = task
            if is_trained(stage_folder(output_dir, cell, name), name):
                done.add(task.name)
        tasks[measuring_name(cell)] = Task(
            measuring_name(cell),
            measure_cell,
            {
                "path": cell_file(output_dir, cell),
                "cell": describe_cell(cell, settings),
                "kind": arm.measures,
                "tuned": arm.tuned,
                "stages": {role: stage_folder(output_dir, cell, name) for role, name in arm.stages.items()},
                "sizes": settings["measuring"],
            },
            needs=tuple(stage_name(cell, name) for name in arm.stages.values()),
            seconds=MEASURING_SECONDS[arm.measures],
            kind=f"measure {arm.measures}",
        )
        if cell.arm == SHEET_ARM and cell.seed == 0:
            task = build_sheet_task(cell, output_dir)
            tasks[task.name] = task
    return list(tasks.values()), done


def build_stage_task(name: str, cell: Cell, output_dir: Path, quick: bool) -> Task:
    stage, folder = STAGES[name], stage_folder(output_dir, cell, name)
    fields = {
        "needs": tuple(stage_name(cell, start) for start in stage.start.values()),
        "seconds": stage.seconds,
        "kind": name.rpartition("-")[0] if name.startswith("semantic-alpha") else name,
    }
    if stage.recipe is None:
        (start,) = stage.start.values()
        arguments = {"model": stage_folder(output_dir, cell, start), "folder": folder}
        return Task(stage_name(cell, name), extract_tokenizer, arguments, **fields)
    overrides = stage_overrides(name, cell, output_dir, quick)
    arguments = {"recipe": stage.recipe, "overrides": overrides, "folder": folder}
    return Task(stage_name(cell, name), train_stage, arguments, **fields)


def build_sheet_task(cell: Cell, output_dir: Path) -> Task:
    stage = ARMS[cell.arm].stages["semantic"]
    return Task(
        f"{cell.group} sheet",
        draw_sheet,
        {
            "before": stage_folder(output_dir, cell, "tokenizer"),
            "after": stage_folder(output_dir, cell, stage),
            "ground": cell.ground,
            "seed": cell.seed,
            "output": output_dir / SHEETS_FOLDER / f"{cell.ground}.png",
        },
        needs=(stage_name(cell, "tokenizer"), stage_name(cell, stage)),
        seconds=10,
    )


def stage_name(cell: Cell, stage: str) -> str:
    """Name of the task that trains a stage."""
    return f"{cell.group} {stage}"


def measuring_name(cell: Cell) -> str:
    """Name of the task that measures a cell."""
    return f"{cell.group} measure {cell.arm}"


def describe_cell(cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields that every cell's file begins with."""
    return {
        "ground": cell.ground,
        "seed": cell.seed,
        "arm": cell.arm,
        "fingerprint": fingerprint(cell.arm, settings),
    }


class Recorder:
    """Records cells that could not be measured, each with its reason."""

    def __init__(self, output_dir: Path, cells: list[Cell], settings: dict[str, Any]):
        self.output_dir, self.settings = output_dir, settings
        self.cells = {measuring_name(cell): cell for cell in cells}
        self.present = read_cells(output_dir, settings)
        self.reasons: dict[str, str] = {}

    def status(self, cell: Cell) -> str | None:
        path = cell_file(self.output_dir, cell)
        return read_json(path)["status"] if path.is_file() else None

    def is_final(self, cell: Cell) -> bool:
        return cell.name in self.present and self.present[cell.name]["status"] in FINAL

    def record(self, task: Task, outcome: Outcome):
        """Writes the file of a cell whose measuring failed, or was skipped because a stage failed."""
        if outcome.status == "failed":
            self.reasons[task.name] = outcome.message
        if outcome.status == "done" or task.name not in self.cells:
            return
        cell = self.cells[task.name]
        cause = task.name if outcome.status == "failed" else outcome.message
        stage = cause.removeprefix(f"{cell.group} ")
        status = "failed"
        if outcome.error == DIVERGENCE:
            status = "skipped" if stage in SHARED else "diverged"
        reason = {"status": status, "stage": stage, "reason": self.reasons[cause]}
        _write(cell_file(self.output_dir, cell), describe_cell(cell, self.settings) | reason)


__all__ = ["StudySummary", "report_study", "run_study"]
