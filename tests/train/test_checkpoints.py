"""Checkpoints: resuming to the last bit, model folders, which one is the newest."""

import json
import logging
import shutil

import pytest
import torch

from modeling_ett.modeling_ett import ETTForConditionalGeneration
from modeling_ett.modeling_ibq import IBQModel
from train import newest_checkpoint, train_only

from .trainers import changed, make_trainer, timeless


def joint_trainer(make_model, args, items):
    model = make_model()
    train_only(model, ["vision_tokenizer", "projector", "language_model"])
    return make_trainer(model, args, items)


def test_a_resumed_joint_run_is_the_uninterrupted_one_to_the_last_bit(make_model, arguments, make_items, tmp_path):
    items = make_items(8)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    whole = joint_trainer(make_model, arguments(**options), items)
    whole.train()

    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    torch.manual_seed(123)
    resumed = joint_trainer(make_model, arguments(**options, output_dir=str(tmp_path / "again")), items)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))

    ours, theirs = resumed.adversary, whole.adversary
    assert changed(whole.model.state_dict(), resumed.model) == set()
    assert changed(theirs.discriminator.state_dict(), ours.discriminator) == set()
    for found, expected in ((resumed, whole), (ours, theirs)):
        states = [player.optimizer.state_dict()["state"] for player in (found, expected)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    assert ours.scheduler.state_dict() == theirs.scheduler.state_dict()
    assert timeless(resumed.state.log_history) == timeless(whole.state.log_history)
    assert resumed.adversary.discriminator.lecam_real.item() != 0


def test_a_resumed_tokenizer_run_is_the_uninterrupted_one_to_the_last_bit(
    make_vision_tokenizer, arguments, make_items, tmp_path
):
    items = make_items(8)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_vision_tokenizer(), arguments(**options), items)
    whole.train()
    resumed = make_trainer(make_vision_tokenizer(), arguments(**options, output_dir=str(tmp_path / "again")), items)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert changed(whole.model.state_dict(), resumed.model) == set()
    assert changed(whole.adversary.discriminator.state_dict(), resumed.adversary.discriminator) == set()


def test_a_checkpoint_is_a_model_folder(make_model, make_vision_tokenizer, arguments, make_items, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    tokenizer = make_vision_tokenizer()
    make_trainer(tokenizer, arguments(**saving), make_items()).train()
    loaded = IBQModel.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert changed(tokenizer.state_dict(), loaded) == set()

    args = arguments(**saving, output_dir=str(tmp_path / "joint"))
    trainer = joint_trainer(make_model, args, make_items())
    trainer.train()
    loaded = ETTForConditionalGeneration.from_pretrained(tmp_path / "joint" / "checkpoint-1")
    assert changed(trainer.model.state_dict(), loaded) == set()


@pytest.fixture
def run_folder(make_vision_tokenizer, arguments, make_items, tmp_path):
    """A run's folder with its checkpoints of the steps 1, 2 and 10."""
    folder = tmp_path / "run"
    make_trainer(make_vision_tokenizer(), arguments(save_strategy="steps", save_steps=1), make_items()).train()
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-10")
    return folder


def test_the_newest_checkpoint_is_that_of_the_latest_step(run_folder):
    assert newest_checkpoint(run_folder) == run_folder / "checkpoint-10"


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "optimizer.pt", "trainer_state.json", "files.json"]
)
def test_a_torn_checkpoint_is_passed_over_with_a_warning(run_folder, name, caplog):
    path = run_folder / "checkpoint-10" / name
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, logger="train.checkpoints"):
        assert newest_checkpoint(run_folder) == run_folder / "checkpoint-2"
    assert name in caplog.text and "checkpoint-10' is passed over" in caplog.text


def test_a_checkpoint_that_lacks_a_file_is_passed_over(run_folder):
    (run_folder / "checkpoint-10" / "scheduler.pt").unlink()
    (run_folder / "checkpoint-2" / "files.json").unlink()
    assert newest_checkpoint(run_folder) == run_folder / "checkpoint-1"


def test_a_list_of_files_names_all_others_with_their_sizes(run_folder):
    folder = run_folder / "checkpoint-2"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "files.json"}
    assert json.loads((folder / "files.json").read_text()) == sizes
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "discriminator.safetensors"} <= sizes.keys()


def test_a_folder_without_checkpoints_has_no_newest_one(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
