"""A run's folder: what it may hold, with what it goes on, and that one run has it at a time."""

import dataclasses

import pytest
import yaml

from ett.train import check_output_folder, load_recipe, run_recipe
from ett.train.checkpointing.folders import FolderLock

from .test_run import TOKENIZER


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has begun, with 50 steps at a rate of 1e-4 that are saved every 10."""
    (tmp_path / "run" / "training").mkdir(parents=True)
    (tmp_path / "run" / "training" / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(begun_with())))
    return tmp_path / "run"


def begun_with(*overrides):
    options = ["training.max_steps=50", "training.learning_rate=1e-4", "training.save_steps=10"]
    return load_recipe("tokenizer", [*options, *overrides])


def test_a_run_goes_on_with_its_recipe(begun):
    assert not check_output_folder(begun, begun_with())
    (begun / "training.json").write_text("{}")
    assert check_output_folder(begun, begun_with())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.learning_rate=2e-4", "training.learning_rate: 0.0001 -> 0.0002"),
        ("training.max_steps=60", "training.max_steps: 50 -> 60"),
        ("training.ema_decay=0.9", "training.ema_decay: "),
        ("data.max_length=7", "data.max_length: 4096 -> 7"),
        ("model.vision_tokenizer.num_vq_embeddings=8", "model.vision_tokenizer.num_vq_embeddings: "),
    ],
)
def test_a_run_of_another_recipe_is_refused_by_the_fields_that_differ(begun, override, told):
    with pytest.raises(
        ValueError, match=r"holds a run of another recipe \(they differ in ([^,]*)\); choose"
    ) as caught:
        check_output_folder(begun, begun_with(override))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "training.save_steps=5",
        "training.logging_steps=1",
        "training.dataloader_num_workers=3",
        "training.report_to=none",
    ],
)
def test_what_leaves_the_result_the_same_may_change(begun, override):
    assert not check_output_folder(begun, begun_with(override))


def test_a_stream_goes_on_with_as_many_workers(begun):
    workers = "training.dataloader_num_workers=3"
    with pytest.raises(ValueError, match=r"data\.streaming: False -> True, training\.dataloader_num_workers: .* -> 3"):
        check_output_folder(begun, begun_with(workers, "data.streaming=true"))


def test_a_run_from_before_a_field_was_known_goes_on_with_its_default(begun):
    recipe_file = begun / "training" / "recipe.yaml"
    fields = yaml.safe_load(recipe_file.read_text())
    del fields["data"]["prompt_dropout"]
    recipe_file.write_text(yaml.safe_dump(fields))
    assert not check_output_folder(begun, begun_with())


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else .*thesis\.tex"):
        run_recipe("demo_tokenizer", TOKENIZER, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is a file; --output-dir must be a folder"):
        run_recipe("demo_tokenizer", TOKENIZER, tmp_path / "notes")


def test_two_runs_do_not_share_a_folder(begun):
    with FolderLock(begun / "training"):
        with pytest.raises(ValueError, match=rf"Another process is training in '{begun}'"):
            FolderLock(begun / "training").__enter__()
    with FolderLock(begun / "training"):
        pass


def test_a_new_folder_is_made_when_it_is_claimed(tmp_path):
    with FolderLock(tmp_path / "run" / "training") as lock:
        assert not (tmp_path / "run").exists()
        lock.claim()
        with pytest.raises(ValueError, match="Another process is training"):
            FolderLock(tmp_path / "run" / "training").claim()


def test_a_run_that_ended_before_its_recipe_was_written_starts_anew(tmp_path):
    with FolderLock(tmp_path / "run" / "training") as lock:
        lock.claim()
    (tmp_path / "run" / "training" / ".recipe.yaml.tmp").write_text("title")
    assert not check_output_folder(tmp_path / "run", begun_with())
