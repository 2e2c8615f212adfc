"""The study: a matrix that fits together, refusals before any work, records, and a killed run that goes on."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import ett
from ett import train
from ett.cli import app
from ett.miniature_ett import schedule, study, study_matrix, study_tasks
from ett.miniature_ett.schedule import run_task
from ett.miniature_ett.schedule_plan import Plan
from ett.miniature_ett.study_matrix import ARMS, STAGES, Cell, chain, choose_cells, stage_overrides
from ett.miniature_ett.study_results import MEASURES
from ett.train.checkpointing.checkpoints import CheckpointError
from ett.train.recipes import CRITICS, VQ_LOSS, load_recipe

ROOT = Path(__file__).parents[2]
CELL = Cell(1, "textured", "")


def recipe(stage, cell=CELL, quick=False):
    return load_recipe(STAGES[stage].recipe, stage_overrides(stage, cell, Path("out"), quick))


# The matrix


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.recipe is not None])
@pytest.mark.parametrize("quick", [False, True])
def test_every_stage_is_a_recipe_with_the_seed_the_ground_and_its_start(name, quick):
    made = recipe(name, quick=quick)
    assert made.training["seed"] == 1 + STAGES[name].seed_offset
    assert made.data.ground == "textured"
    for field, start in STAGES[name].start.items():
        assert start in STAGES
        assert getattr(made.model, field.removeprefix("model.")) == f"out/textured-1/{start}"


def test_stages_come_after_what_they_start_from():
    ordered = chain(["chat-fresh-language-model"])
    assert ordered == [
        *("tokenizer", "language", "alignment", "semantic-alpha-0.25", "tuned-tokenizer"),
        *("language-fresh", "alignment-fresh", "semantic-fresh-language-model", "chat-fresh-language-model"),
    ]


def test_frozen_arms_differ_from_tuned_ones_in_the_frozen_tokenizer_alone():
    tuned, frozen = recipe("semantic-alpha-0.25"), recipe("semantic-embedding-frozen")
    assert set(tuned.train) - set(frozen.train) == {"vision_tokenizer"}
    # Codes of a frozen tokenizer are made once.
    frozen.train, frozen.data.in_memory = tuned.train, tuned.data.in_memory
    # The losses of the tokenizer go with it.
    for one in (tuned, frozen):
        one.training = {name: value for name, value in one.training.items() if name not in (*VQ_LOSS, *CRITICS)}
    assert tuned == frozen
    fresh = recipe("semantic-fresh-language-model")
    fresh.model.path = recipe("semantic-embedding-frozen").model.path
    assert fresh == recipe("semantic-embedding-frozen")


@pytest.mark.parametrize("alpha", ["0", "0.5", "1"])
def test_arms_of_table_5_differ_in_alpha_alone(alpha):
    arm, default = recipe(f"semantic-alpha-{alpha}"), recipe("semantic-alpha-0.25")
    assert (arm.training.pop("alpha"), default.training.pop("alpha")) == (float(alpha), 0.25)
    assert arm == default
    chats = [recipe(f"chat-alpha-{each}") for each in (alpha, "0.25")]
    chats[0].model.path = chats[1].model.path
    assert chats[0] == chats[1]


def test_the_index_arm_trains_an_embedding_of_codes_in_place_of_the_projector():
    language, index = recipe("language"), recipe("language-index")
    assert (language.model.of_new("visual_embedding"), index.model.of_new("visual_embedding")) == ("codebook", "index")
    index.model.visual_embedding = None
    assert index == language and not language.model.of_new("code_positions")
    for kind in ("alignment", "semantic", "chat", "generation"):
        index = recipe("alignment-index" if kind == "alignment" else f"{kind}-index-frozen")
        embedding = recipe("alignment" if kind == "alignment" else f"{kind}-embedding-frozen")
        assert index.train == ["index_embedding", *(part for part in embedding.train if part != "projector")]
        index.train, index.model.path = embedding.train, embedding.model.path
        assert index == embedding


def test_controls_change_what_they_ask_about():
    assert "training.caption_gradient_to_tokenizer=false" in STAGES["semantic-vq-only"].overrides
    frozen, twice = recipe("semantic-embedding-frozen"), recipe("semantic-frozen-twice-as-long")
    assert twice.training["max_steps"] == 2 * frozen.training["max_steps"]
    assert twice.data.length == 2 * frozen.data.length
    assert recipe("language-fresh").training["seed"] != recipe("language").training["seed"]


def test_stage_2_is_long_and_chat_short_as_in_the_paper():
    semantic, chat = recipe("semantic-alpha-0.25"), recipe("chat-alpha-0.25")
    assert semantic.data.length / chat.data.length > 3
    for stage in (semantic, chat):
        batch = stage.training["per_device_train_batch_size"]
        assert stage.training["max_steps"] * batch == stage.data.length


def test_cells_come_seed_by_seed_and_controls_on_textured_ground_alone():
    cells = choose_cells()
    assert len(cells) == len(set(cells)) == 5 * 12 + 3 * 12 + 3 * 3
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    controls = {(cell.ground, cell.seed) for cell in cells if ARMS[cell.arm].is_control}
    assert controls == {("textured", seed) for seed in range(3)}
    assert {cell.name for cell in choose_cells(["flat"], 1, ["alpha-1", "tokenizer"])} == {
        "flat-0-alpha-1",
        "flat-0-tokenizer",
    }
    assert len(choose_cells(seeds=2)) == 2 * (12 + 12 + 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["alpha-0.3"]}, "There is no arm 'alpha-0.3'. Did you mean 'alpha-0"),
        ({"grounds": ["plain"]}, "There is no ground 'plain'. Known are: textured, flat"),
        ({"seeds": 0}, "seeds is 0; expected at least 1"),
        ({"grounds": ["flat"], "only": ["vq-only"]}, "The arm vq-only is a control, which runs on textured alone"),
    ],
)
def test_what_is_no_cell_is_an_error(arguments, message):
    with pytest.raises(ValueError) as caught:
        choose_cells(**arguments)
    assert message in str(caught.value)


# Folders


ONLY = ["embedding-frozen"]


@pytest.fixture
def started(tmp_path):
    """The folder of a study that has begun."""
    folder = tmp_path / "ett-study"
    (folder / "cells").mkdir(parents=True)
    study.start_folder(folder, study.describe_settings(set(ONLY), quick=False))
    return folder


def change(folder, **fields):
    path = folder / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder, **arguments):
    before = sorted(folder.rglob("*")) if folder.is_dir() else None
    with pytest.raises(ValueError) as caught:
        study.run_study(folder, only=ONLY, **arguments)
    assert before is None or sorted(folder.rglob("*")) == before
    return str(caught.value)


def test_a_study_of_other_settings_is_refused_with_the_field(started, monkeypatch):
    study.check_folder(started, study.describe_settings(set(ONLY), quick=False))
    overrides = ("training.max_steps=300", *study_matrix.CHAT[1:])
    stage = STAGES["chat-embedding-frozen"]
    changed = study_matrix.Stage(stage.recipe, stage.start, stage.seconds, overrides)
    monkeypatch.setitem(STAGES, "chat-embedding-frozen", changed)
    assert "differ in stages.chat-embedding-frozen.recipe.training.max_steps: 400 -> 300)" in refusal(started)


def test_a_study_of_another_version_is_refused(started):
    change(started, version="0.0.1")
    assert f"they differ in version: 0.0.1 -> {ett.__version__}" in refusal(started)


def test_a_quick_study_is_no_full_one(started):
    assert "they differ in quick: False -> True" in refusal(started, quick=True)


def test_a_study_may_grow_by_arms(started):
    settings = study.describe_settings({"alpha-1"}, quick=False)
    study.check_folder(started, settings)
    assert study.start_folder(started, settings)["stages"].keys() >= {"semantic-alpha-1", "semantic-embedding-frozen"}


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    assert "holds something else (for instance thesis.txt)" in refusal(tmp_path)
    assert "thesis.txt' is a file; --output-dir must be a folder" in refusal(tmp_path / "thesis.txt")


def test_a_broken_settings_file_is_refused(started):
    (started / "study.json").write_text("{")
    assert "study.json' cannot be read" in refusal(started)


def test_a_stage_folder_of_another_recipe_is_refused(started):
    folder = started / "textured-0" / "chat-embedding-frozen"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").touch()
    assert "chat-embedding-frozen' holds something else" in refusal(started)


def test_two_studies_do_not_share_a_folder(started):
    with study.FolderLock(started / "cells") as lock:
        lock.claim()
        assert "Another process is training in" in refusal(started)


# What is recorded, with tasks that train nothing


def fake_stage(report, recipe, overrides, folder):
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "recipe.yaml").write_text(yaml.safe_dump(asdict(load_recipe(recipe, overrides))))
    (folder / "training.json").write_text("{}")
    TRAINED.append(folder.name)


def fake_measure(report, path, cell, kind, tuned, stages, sizes):
    study_tasks.write_cell(path, {**cell, "status": "done", "seconds": {}, "peak_memory_gb": 1.0, "measures": {}})


TRAINED: list[str] = []


@pytest.fixture
def in_process(monkeypatch):
    """Runs tasks one after the other in this process, with fakes that a test may replace."""
    TRAINED.clear()
    monkeypatch.setattr(study, "train_stage", fake_stage)
    monkeypatch.setattr(study, "measure_cell", fake_measure)
    monkeypatch.setattr(schedule.traceback, "print_exc", lambda: None)

    def run_tasks(tasks, processes, done, on_end, log):
        plan = Plan(tasks, 1, done)
        while not plan.is_finished():
            for task in plan.take_startable():
                kind, outcome = run_task(task, lambda step, steps: None)
                if kind == "stop":
                    raise study.StopTasks(outcome)
                for ended, result in plan.end(task, outcome):
                    on_end(ended, result)

    monkeypatch.setattr(study, "run_tasks", run_tasks)


def failing(monkeypatch, stage, error):
    def train_stage(report, recipe, overrides, folder):
        if folder.name == stage:
            raise error
        fake_stage(report, recipe, overrides, folder)

    monkeypatch.setattr(study, "train_stage", train_stage)


def run(folder, *only):
    return study.run_study(folder, ["flat"], 1, only=only).statuses


def cell_of(folder, arm):
    return json.loads((folder / "cells" / f"flat-0-{arm}.json").read_text())


SENTENCE = "Step 7: caption_loss is nan."


def test_a_stage_that_diverges_is_recorded_for_its_cells_and_not_tried_again(tmp_path, in_process, monkeypatch):
    failing(monkeypatch, "semantic-alpha-0", train.NonFiniteLossError(SENTENCE))
    assert run(tmp_path, "alpha-0", "alpha-1") == {"diverged": 1, "done": 1}
    cell = cell_of(tmp_path, "alpha-0")
    assert (cell["status"], cell["stage"], cell["reason"]) == ("diverged", "semantic-alpha-0", SENTENCE)
    assert f"- flat-0-alpha-0 diverged in `semantic-alpha-0`: {SENTENCE}" in (tmp_path / "report/study.md").read_text()
    monkeypatch.setattr(study, "train_stage", None)
    assert run(tmp_path, "alpha-0", "alpha-1") == {"diverged": 1, "done": 1}


def test_cells_of_a_shared_stage_that_diverges_are_skipped(tmp_path, in_process, monkeypatch):
    failing(monkeypatch, "tokenizer", train.NonFiniteLossError(SENTENCE))
    assert run(tmp_path, "alpha-0", "tokenizer") == {"skipped": 2}
    assert cell_of(tmp_path, "alpha-0") | {"status": "skipped", "stage": "tokenizer", "reason": SENTENCE} == cell_of(
        tmp_path, "alpha-0"
    )


def test_a_cell_that_failed_is_tried_again_from_the_stages_that_are_there(tmp_path, in_process, monkeypatch):
    failing(monkeypatch, "chat-alpha-0", RuntimeError("out of luck"))
    assert run(tmp_path, "alpha-0") == {"failed": 1}
    assert cell_of(tmp_path, "alpha-0")["reason"] == "out of luck"
    monkeypatch.setattr(study, "train_stage", fake_stage)
    TRAINED.clear()
    assert run(tmp_path, "alpha-0") == {"done": 1}
    assert TRAINED == ["chat-alpha-0"]


def test_finished_cells_are_left_as_they_are(tmp_path, in_process, monkeypatch):
    run(tmp_path, "embedding-frozen")
    TRAINED.clear()
    run(tmp_path, "embedding-frozen", "alpha-1")
    assert TRAINED == ["semantic-alpha-1", "chat-alpha-1"]


def test_cells_of_a_results_file_are_not_run_again(tmp_path, in_process):
    run(tmp_path / "first", "embedding-frozen")
    results = study.report_study(tmp_path / "first", tmp_path / "docs").with_name("study") / "results.json"
    TRAINED.clear()
    arguments = {"only": ["embedding-frozen", "tokenizer"], "known": results}
    assert study.run_study(tmp_path / "second", ["flat"], 1, **arguments).statuses == {"done": 2}
    assert TRAINED == ["tokenizer"]
    assert cell_of(tmp_path / "second", "embedding-frozen") == cell_of(tmp_path / "first", "embedding-frozen")


def test_a_results_file_of_other_settings_is_refused(tmp_path, in_process):
    run(tmp_path / "first", "embedding-frozen")
    results = study.report_study(tmp_path / "first", tmp_path / "docs").with_name("study") / "results.json"
    contents = json.loads(results.read_text())
    contents["settings"]["measuring"]["scenes"] = 7
    results.write_text(json.dumps(contents))
    assert "differ in measuring.scenes: 7 -> 400" in refusal(tmp_path / "second", known=results)
    results.write_text("{}")
    assert "is no results file of a study" in refusal(tmp_path / "second", known=results)
    assert "There is no results file" in refusal(tmp_path / "second", known=tmp_path / "nowhere.json")


def test_a_full_disk_ends_the_study_with_a_sentence(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(study, "train_stage", study_tasks.train_stage)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(study_tasks.train, "run_recipe", full)
    with pytest.raises(OSError, match=r"tokenizer' could not be written: No space left on device\. Make room and run"):
        run(tmp_path, "tokenizer")
    assert list((tmp_path / "cells").glob("*.json")) == []

    def no_checkpoint(*args, **kwargs):
        raise CheckpointError("checkpoint-500 could not be written; make room and run again to go on.")

    monkeypatch.setattr(study_tasks.train, "run_recipe", no_checkpoint)
    with pytest.raises(OSError, match="checkpoint-500 could not be written"):
        run(tmp_path, "tokenizer")


def test_a_record_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(study, "write_cell", full)
    with pytest.raises(OSError, match=r"No space left on device\. Make room and run the same command again"):
        study.run_study(tmp_path, only=ONLY)


def test_numbers_are_stored_with_five_digits(tmp_path):
    study_tasks.write_cell(tmp_path / "cell.json", {"a": {"b": 0.123456789, "c": float("nan"), "d": 3, "e": None}})
    assert json.loads((tmp_path / "cell.json").read_text()) == {"a": {"b": 0.12346, "c": None, "d": 3, "e": None}}


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def test_the_command_says_what_is_there_and_fails_where_cells_failed(tmp_path, in_process, monkeypatch):
    arguments = ("--only", "tokenizer", "--ground", "flat", "--seeds", "1", "--output-dir", tmp_path)
    failing(monkeypatch, "tokenizer", RuntimeError("out of luck"))
    result = invoke(*arguments)
    assert result.exit_code == 1 and "Cells: 1 failed." in result.stdout
    assert (
        result.stderr == f"ett: Some cells failed; see {tmp_path}/study.log and run the same command again to retry.\n"
    )
    monkeypatch.setattr(study, "train_stage", fake_stage)
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"Cells: 1 done.\nWrote {tmp_path}/report/study.md.\n"
    result = invoke("--report", "--output-dir", tmp_path, "--docs-dir", tmp_path / "docs")
    assert result.stdout == f"Wrote {tmp_path}/docs/study.md.\n"


def test_the_command_refuses_an_unknown_arm_in_one_sentence(tmp_path):
    result = invoke("--only", "alpha-2", "--output-dir", tmp_path)
    assert result.exit_code == 1 and result.stderr.startswith("ett: There is no arm 'alpha-2'.")
    assert result.stderr.count("\n") == 1


# The real tasks, a few steps each


def test_a_killed_study_goes_on_and_measures_all(tmp_path, request):
    command = [sys.executable, "-m", "ett", "study", "--quick", "--seeds", "1", "--ground", "flat", "--processes", "1"]
    command += ["--only", "tokenizer", "--only", "alpha-0.25", "--output-dir", str(tmp_path / "study")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    request.addfinalizer(first.kill)
    models, cells = tmp_path / "study" / "flat-0", tmp_path / "study" / "cells"
    deadline = time.monotonic() + 600
    while not (models / "language" / "training.json").is_file():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[1]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 143
    trained = {path: path.stat().st_mtime_ns for path in models.glob("*/training.json")}

    summary = study.run_study(tmp_path / "study", ["flat"], 1, 1, ["tokenizer", "alpha-0.25"], quick=True)
    assert summary.statuses == {"done": 2}
    kept = {path: path.stat().st_mtime_ns for path in trained if path.parent.name == "tokenizer"}
    assert kept == {path: trained[path] for path in kept}
    assert not list(models.glob("*/training/checkpoint-*"))

    tokenizer, tuned = (json.loads((cells / f"flat-0-{arm}.json").read_text()) for arm in ("tokenizer", "alpha-0.25"))
    families = {name: {key for key in MEASURES if key.startswith(name)} for name in ("tokenizer", "probe")}
    assert tokenizer["measures"].keys() == families["tokenizer"] | families["probe"]
    assert tuned["measures"].keys() == MEASURES.keys() - {key for key in MEASURES if key.startswith("generation.")}
    assert tuned["seconds"].keys() == {"semantic", "chat", "measuring"} and tuned["peak_memory_gb"] > 0.1
    assert tuned["measures"]["tokenizer.psnr"] != tokenizer["measures"]["tokenizer.psnr"]
    page = (tmp_path / "study" / "report" / "study.md").read_text()
    assert "A quick run" in page and "sheet-flat.png" in page


def test_the_language_model_of_the_index_arm_is_that_of_the_others(tmp_path):
    """Both begin with the same seed, and differ only in what stands for a code."""
    few = ["training.max_steps=2", "data.length=16", "training.report_to=none", "training.seed=3"]
    train.run_recipe("demo_tokenizer", few, tmp_path / "tokenizer", progress=False)
    states = []
    for name in ("language", "language-index"):
        overrides = [*few, f"model.vision_tokenizer={tmp_path / 'tokenizer'}", *STAGES[name].overrides]
        train.run_recipe("demo_language", overrides, tmp_path / name, progress=False)
        model = study_tasks.ETTForConditionalGeneration.from_pretrained(tmp_path / name)
        states.append(model.model.language_model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
