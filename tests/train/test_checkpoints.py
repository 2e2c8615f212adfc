"""Checkpoints: resuming to the last bit, model folders, which one is the newest."""

import json
import logging
import shutil

import pytest
import torch

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTProcessor, build_word_tokenizer
from ett.scenes_ett import vocabulary
from ett.train import PreparedDataset, SceneExamples, newest_checkpoint, train_only
from ett.train.models.adapters import add_adapter
from ett.train.recipes import LoraSection

from .trainers import changed, make_trainer, snapshot, timeless


def joint_trainer(make_model, args, items):
    model = make_model()
    train_only(model, ["vision_tokenizer", "projector", "language_model"])
    return make_trainer(model, args, items)


@pytest.fixture
def make_stage(make_model, make_vision_tokenizer, make_language_model, make_items, arguments):
    """Makes a stage's trainer, whose epochs have two steps."""

    def drawings():
        tokenizer = build_word_tokenizer(vocabulary())
        processor = ETTProcessor.from_parts(tokenizer, 4, image_size=16)
        model = make_model(
            make_language_model(vocab_size=len(tokenizer)),
            image_token_id=processor.image_token_id,
            image_start_token_id=processor.image_start_token_id,
            image_end_token_id=processor.image_end_token_id,
        )
        return model, PreparedDataset(
            SceneExamples("drawing", 0, "train", 4), "drawing", processor, prompt_dropout=0.5
        )

    def make(stage, **changes):
        parts, options = STAGES[stage]
        args = arguments(**{"max_steps": 4, "lr_scheduler_type": "cosine", **options, **changes})
        items = make_items(4 * args.gradient_accumulation_steps, codes=stage == "chat")
        if stage == "tokenizer":
            return make_trainer(make_vision_tokenizer(), args, items)
        model = make_model()
        if stage == "drawing":
            model, items = drawings()
        if stage == "adapters":
            add_adapter(model, LoraSection(rank=2, dropout=0.5))
        train_only(model, parts)
        return make_trainer(model, args, items, predicts_codes=stage == "drawing")

    return make


STAGES = {
    "tokenizer": ([], {"ema_decay": 0.5, "gradient_accumulation_steps": 2, "discriminator_warmup_steps": 2}),
    "alignment": (["projector"], {"dataloader_num_workers": 2}),
    "joint": (
        ["vision_tokenizer", "projector", "language_model"],
        {"muon_rate_factor": 0.5, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
    ),
    "chat": (["projector", "language_model"], {"gradient_accumulation_steps": 2}),
    "drawing": (["projector", "language_model", "visual_head"], {"muon_rate_factor": 0.5}),
    "adapters": (["projector", "language_model"], {}),
}


def course(trainer):
    """All that a step changes: weights, states of optimizers and schedules, averages, random numbers."""
    player, average = trainer.adversary, trainer.average
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "rates": trainer.lr_scheduler.get_last_lr(),
        "average": {} if average is None else average.weights,
        "discriminator": {} if player is None else player.discriminator.state_dict(),
        "discriminator_optimizer": {} if player is None else player.optimizer.state_dict()["state"],
        "discriminator_rates": [] if player is None else player.scheduler.get_last_lr(),
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(make_stage, tmp_path, stage):
    """From the middle of an epoch and from an epoch's end, which ends the warm-up of the tokenizer's discriminator."""
    whole = make_stage(stage, save_strategy="steps", save_steps=1)
    whole.train()
    expected = course(whole)
    for step in (1, 2):
        torch.manual_seed(123)
        resumed = make_stage(stage, output_dir=str(tmp_path / f"from-{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        torch.testing.assert_close(course(resumed), expected, rtol=0, atol=0)
        assert timeless(resumed.state.log_history) == timeless(whole.state.log_history)


@pytest.mark.parametrize("stage", ["tokenizer", "chat"])
def test_a_run_that_resumes_between_two_logs_logs_the_means_of_an_uninterrupted_one(make_stage, tmp_path, stage):
    whole = make_stage(stage, logging_steps=3, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_stage(stage, logging_steps=3, output_dir=str(tmp_path / "again"))
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [entry["step"] for entry in timeless(whole.state.log_history)] == [3]
    assert timeless(resumed.state.log_history) == timeless(whole.state.log_history)

    each = make_stage(stage, logging_steps=1, output_dir=str(tmp_path / "each"))
    each.train()
    losses = [entry["loss"] for entry in timeless(each.state.log_history)]
    assert output.training_loss == pytest.approx(sum(losses[2:]) / 2)


def test_resuming_a_run_at_its_last_step_changes_nothing(make_stage, tmp_path):
    whole = make_stage("tokenizer", max_steps=3, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_stage("tokenizer", max_steps=3, output_dir=str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 3
    assert changed(whole.model.state_dict(), resumed.model) == set()


def test_a_resumed_run_saves_and_logs_as_often_as_it_is_told_now(make_stage, tmp_path):
    make_stage("tokenizer", save_strategy="steps", save_steps=1).train()
    resumed = make_stage(
        "tokenizer", save_strategy="steps", save_steps=3, logging_steps=4, output_dir=str(tmp_path / "again")
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert [entry["step"] for entry in timeless(resumed.state.log_history)] == [1, 4]


def test_the_newest_checkpoints_are_kept_and_those_of_a_run_begun_anew_give_way(make_stage, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_stage("tokenizer", **saving).train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    make_stage("tokenizer", **saving, max_steps=2).train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1", "checkpoint-2"]


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
    with caplog.at_level(logging.WARNING, logger="ett.train.checkpointing.checkpoints"):
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


# The best checkpoint


@pytest.mark.parametrize("kind", ["tokenizer", "model", "adapter"])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_best_weights_and_their_average_come_back_at_the_end(
    make_vision_tokenizer, make_model, arguments, make_items, tmp_path, kind, decay, caplog
):
    model = make_vision_tokenizer() if kind == "tokenizer" else make_model()
    if kind == "adapter":
        add_adapter(model, LoraSection(rank=4))
    if kind != "tokenizer":
        train_only(model, ["projector", "language_model"])
    args = arguments(
        max_steps=3,
        ema_decay=decay,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer = make_trainer(model, args, make_items(8), eval_dataset=make_items(2))
    losses, seen = {1: 162.9, 2: 79.9, 3: 214.4}, {}

    def evaluate(**kwargs):
        step = trainer.state.global_step
        average = None if decay is None else {name: value.clone() for name, value in trainer.average.weights.items()}
        seen[step] = snapshot(trainer.model), average
        return {"eval_loss": losses[step]}

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    weights, average = seen[2]
    assert changed(weights, trainer.model) == set()
    assert changed(seen[3][0], trainer.model)
    if decay is not None:
        torch.testing.assert_close(trainer.average.weights, average, rtol=0, atol=0)
    assert "Could not locate the best model" not in caplog.text
