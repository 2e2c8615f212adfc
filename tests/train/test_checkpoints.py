"""Checkpoints: resuming to the last bit, model folders, which one is the newest."""

import json

import torch

from modeling_ett.modeling_ett import ETTForConditionalGeneration
from modeling_ett.modeling_ibq import IBQModel
from train import newest_checkpoint, train_only

from .trainers import changed, make_trainer


def timeless(history):
    """What was logged, less durations."""
    entries = [entry for entry in history if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if "runtime" not in key} for entry in entries]


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

    for ours, theirs in ((resumed.model, whole.model), (resumed.discriminator, whole.discriminator)):
        assert changed(theirs.state_dict(), ours) == set()
    for name in ("optimizer", "discriminator_optimizer"):
        torch.testing.assert_close(
            getattr(resumed, name).state_dict()["state"], getattr(whole, name).state_dict()["state"], rtol=0, atol=0
        )
    assert timeless(resumed.state.log_history) == timeless(whole.state.log_history)
    assert resumed.discriminator.lecam_real.item() != 0


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
    assert changed(whole.discriminator.state_dict(), resumed.discriminator) == set()


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


def test_the_newest_checkpoint_is_the_newest_complete_one(tmp_path):
    for step, state in ((2, {"global_step": 2}), (10, {"global_step": 10}), (9, {"global_step": 9})):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_folder_without_checkpoints_has_no_newest_one(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
