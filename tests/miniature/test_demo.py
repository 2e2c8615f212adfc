"""The demo: a plan that fits together, refusals before any work, and all that it leaves behind."""

import json

import pytest

import ett  # noqa: F401 (registers with the Auto classes)
from ett.miniature_ett import demo
from ett.train import load_recipe

FOLDERS = ("ett-tokenizer", "ett-chat", "ett-gen")


def plan(tmp_path):
    folders = {stage.name: tmp_path / stage.folder for stage in demo.STAGES}
    return folders, {stage.name: demo.stage_overrides(stage, folders, 7, False) for stage in demo.STAGES}


def test_every_stage_starts_from_stages_before_it():
    names = [stage.name for stage in demo.STAGES]
    for number, stage in enumerate(demo.STAGES):
        assert set(stage.start.values()) <= set(names[:number])


def test_every_stage_resolves_with_the_seed_and_the_folder_that_it_starts_from(tmp_path):
    folders, overrides = plan(tmp_path)
    recipes = {stage.name: load_recipe(stage.recipe, overrides[stage.name]) for stage in demo.STAGES}
    assert {recipe.training["seed"] for recipe in recipes.values()} == {7}
    assert recipes["chat"].model.path == str(folders["semantic"])
    assert recipes["gen"].model.path == str(folders["semantic"])
    assert recipes["semantic"].model.path == str(folders["alignment"])


def test_the_demo_trains_the_tuned_models_alone():
    assert [stage.name for stage in demo.STAGES] == [
        "tokenizer",
        "language",
        "alignment",
        "semantic",
        "gen",
        "chat",
    ]
    assert [stage.name for stage in demo.STAGES if stage.beside] == ["chat"]
    recipes = {stage.name: load_recipe(stage.recipe, list(stage.overrides)) for stage in demo.STAGES}
    assert [name for name, recipe in recipes.items() if "vision_tokenizer" in recipe.train] == [
        "tokenizer",
        "semantic",
    ]


def test_the_end_of_a_run_names_stages_that_have_not_learned(capsys):
    def stage(title, losses):
        return {"title": title, "history": [{"step": step, "loss": loss} for step, loss in enumerate(losses)]}

    demo.warn_of_stages_without_learning([stage("Tokenizer", [2.0, 1.0]), stage("Stage 3: chat", [2.0, 1.9])])
    assert capsys.readouterr().err == "Stage 3: chat has not learned: loss 2, at the end 1.9.\n"
    demo.warn_of_stages_without_learning([stage("Language model", [])])
    assert capsys.readouterr().err == "Language model has not learned: it logged no loss.\n"


@pytest.mark.parametrize("name", ["ett-gen", "report"])
def test_a_folder_with_something_else_is_refused_before_training(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match=f"{name}' holds something else"):
        demo.run_demo(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "thesis.txt").read_text() == "three years of work"


def test_a_file_in_the_place_of_the_output_folder_is_refused_before_training(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match=r"thesis\.txt' is a file; --output-dir must be a folder"):
        demo.run_demo(tmp_path / "thesis.txt", quick=True)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_the_clock_corrects_the_plan_by_the_pace_so_far(monkeypatch, capsys):
    now = iter([0.0, 240.0])
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(now))
    demo.Clock([120, 60]).begin(2, "drawing")
    assert "[2/2] drawing · about 2 min left" in capsys.readouterr().err


def test_a_run_leaves_three_models_with_cards_and_a_report_and_resumes_at_once(tmp_path, monkeypatch):
    few = {"data.length": 16, "training.max_steps": 2, "training.discriminator_start_step": 1}
    monkeypatch.setattr(demo, "QUICK", demo.QUICK | few | {"training.logging_steps": 1})
    page = demo.run_demo(tmp_path, seed=3, quick=True)
    assert page == tmp_path / "report" / "index.html"
    assert "quick run" in page.read_text().lower()
    for name in FOLDERS:
        card = (tmp_path / name / "README.md").read_text()
        assert "model-index" in card and "quick run" in card.lower()
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [stage["steps"] for stage in results["stages"]] == [2] * len(demo.STAGES)
    monkeypatch.setattr(demo.train.run, "ETTTrainer", None)
    assert demo.run_demo(tmp_path, seed=3, quick=True) == page
