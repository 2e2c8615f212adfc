"""What is shown of a tokenizer that learns: contact sheets, and TensorBoard's curves."""

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import ETTCollator, ETTTrainer, train_only
from train.sheets import draw_sheet, first_pictures

FRAME = 2


@pytest.fixture
def make_trainer(make_vision_tokenizer, arguments, make_items):
    """Makes a trainer of a tokenizer that draws a sheet each second step, or of another model."""

    def make(model=None, items=None, **changes):
        args = arguments(**{"sheet_steps": 2, "max_steps": 3, **changes})
        model = model or make_vision_tokenizer()
        return ETTTrainer(model=model, args=args, train_dataset=items or make_items(), data_collator=ETTCollator())

    return make


@pytest.fixture
def board(tmp_path):
    """Reads what the run in `tmp_path` reported to TensorBoard."""

    def read():
        accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
        return accumulator.Reload()

    return read


def sheet(tmp_path, step):
    return np.asarray(Image.open(tmp_path / "run" / "sheets" / f"step-{step:06d}.png"))


# Contact sheets


def test_a_sheet_is_drawn_every_so_many_steps_and_at_the_end(make_trainer, tmp_path):
    make_trainer(max_steps=5).train()
    names = sorted(path.name for path in (tmp_path / "run" / "sheets").iterdir())
    assert names == ["step-000002.png", "step-000004.png", "step-000005.png"]


def test_no_sheet_is_drawn_unless_asked_for(make_trainer, tmp_path):
    make_trainer(sheet_steps=0).train()
    assert not (tmp_path / "run" / "sheets").exists()


def test_a_sheet_has_the_same_pictures_above_and_reconstructions_below(make_trainer, make_items, tmp_path):
    trainer, items = make_trainer(), make_items()
    trainer.train()
    for step in (2, 3):
        drawn = sheet(tmp_path, step)
        assert drawn.shape == (2 * (16 + FRAME) + FRAME, 4 * (16 + FRAME) + FRAME, 3)
        for column, item in enumerate(items):
            left = FRAME + column * (16 + FRAME)
            original = drawn[FRAME : FRAME + 16, left : left + 16]
            assert np.array_equal(original, item["pixel_values"][0].permute(1, 2, 0).numpy())
    pixels = first_pictures(items, 4)
    with torch.no_grad():
        last = trainer.model.eval()(pixels[3:]).sample[0].clamp(-1, 1)
    expected = ((last + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(drawn[-16 - FRAME : -FRAME, -16 - FRAME : -FRAME] - expected).max() <= 0.51


def test_a_sheet_shows_at_most_eight_pictures(make_items):
    assert first_pictures(make_items(20), 8).shape == (8, 3, 16, 16)


def test_making_sheets_does_not_change_training(make_trainer, make_items):
    with_sheets, without = make_trainer(sheet_steps=1), make_trainer(sheet_steps=0)
    for trainer in (with_sheets, without):
        trainer.train()
    losses = [
        [entry["vq_loss"] for entry in t.state.log_history if "vq_loss" in entry] for t in (with_sheets, without)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    torch.testing.assert_close(with_sheets.model.state_dict(), without.model.state_dict(), rtol=0, atol=0)


def test_a_sheet_is_of_the_averaged_weights(make_trainer, make_vision_tokenizer, make_items, tmp_path):
    # An average that hardly moves is still that of the initial weights.
    make_trainer(ema_decay=1 - 1e-9, learning_rate=1e-2).train()
    expected = draw_sheet(make_vision_tokenizer(), first_pictures(make_items(), 8)).permute(1, 2, 0).numpy()
    assert np.abs(sheet(tmp_path, 3).astype(int) - expected).max() <= 1


def test_sheets_are_drawn_of_the_tokenizer_in_a_whole_model(make_trainer, make_model, tmp_path):
    model = make_model()
    train_only(model, ["vision_tokenizer", "projector"])
    make_trainer(model).train()
    assert sheet(tmp_path, 3).shape == (38, 74, 3)


def test_a_frozen_tokenizer_is_not_drawn(make_trainer, make_model, tmp_path):
    model = make_model()
    train_only(model, ["projector"])
    make_trainer(model).train()
    assert not (tmp_path / "run" / "sheets").exists()


def test_data_without_pictures_have_no_sheet():
    with pytest.raises(ValueError, match=r"training data have none; set training\.sheet_steps=0"):
        first_pictures([{"input_ids": [1]}], 8)


def test_a_negative_number_of_steps_is_an_error(arguments):
    with pytest.raises(ValueError, match="sheet_steps is -1; expected a number of steps, or 0 for none"):
        arguments(sheet_steps=-1)


# TensorBoard


def test_curves_and_sheets_go_to_tensorboard(make_trainer, board):
    trainer = make_trainer(report_to="tensorboard")
    trainer.train()
    read = board()
    for name in ("vq_loss", "discriminator_loss", "codebook_usage", "codebook_perplexity", "discriminator_grad_norm"):
        expected = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        curve = [(point.step, point.value) for point in read.Scalars(f"train/{name}")]
        assert len(curve) == 3
        assert curve == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert [image.step for image in read.Images("reconstructions")] == [2, 3]


def test_a_resumed_run_goes_on_in_the_same_curves(make_trainer, board, tmp_path):
    saving = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2}
    make_trainer(**saving).train()
    make_trainer(**saving).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [point.step for point in board().Scalars("train/vq_loss")] == [1, 2, 3]


def test_gradient_norms_are_logged_without_a_limit_and_change_nothing(make_trainer):
    trainers = [make_trainer(max_grad_norm=limit, sheet_steps=0) for limit in (0.0, 1e9)]
    for trainer in trainers:
        trainer.train()
    logs = [
        [
            (entry["grad_norm"], entry["discriminator_grad_norm"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        for trainer in trainers
    ]
    assert len(logs[0]) == 3 and all(norm > 0 for entry in logs[0] for norm in entry)
    assert logs[0] == logs[1]
    for name in ("model", "discriminator"):
        states = [getattr(trainer, name).state_dict() for trainer in trainers]
        torch.testing.assert_close(*states, rtol=0, atol=0)
