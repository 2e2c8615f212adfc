"""What is shown of a model that learns: reconstructions, answers, drawings, and TensorBoard's curves."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ett.train import ETTCollator, ETTTrainer, train_only
from ett.train.monitoring.board import put_before_now
from ett.train.monitoring.samples import draw_sheet, first_images, question_of

FRAME = 2
MAX_NEW_TOKENS = 6


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr("ett.train.monitoring.samples.MAX_NEW_TOKENS", MAX_NEW_TOKENS)


@pytest.fixture
def make_trainer(make_vision_tokenizer, arguments, make_items):
    """Makes a trainer of a tokenizer that draws samples each second step, or of another model."""

    def make(model=None, items=None, predicts_codes=False, **changes):
        args = arguments(**{"sample_steps": 2, "max_steps": 3, **changes})
        return ETTTrainer(
            model=model or make_vision_tokenizer(),
            args=args,
            train_dataset=items or make_items(),
            data_collator=ETTCollator(predicts_codes=predicts_codes),
        )

    return make


@pytest.fixture
def make_stage(make_trainer, make_model, make_items):
    """Makes a trainer of a whole model: `caption` or `drawing` with a frozen tokenizer, or `semantic`."""

    def make(stage, codes=False, **changes):
        model = make_model()
        frozen = ["projector", "language_model"] + ["visual_head"] * (stage == "drawing")
        train_only(model, ["vision_tokenizer", *frozen[:2]] if stage == "semantic" else frozen)
        items = make_items(codes=codes or stage == "drawing")
        if stage == "drawing":
            # A prompt of two words, then the image.
            items = [{**item, "input_ids": [11, 12 + n, *item["input_ids"][:18]]} for n, item in enumerate(items)]
            items = [{name: item[name] for name in ("input_ids", "image_codes")} for item in items]
        return make_trainer(model, items, stage == "drawing", **changes)

    return make


@pytest.fixture
def board(tmp_path):
    """Reads what the run in `tmp_path` reported to TensorBoard."""

    def read():
        accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
        return accumulator.Reload()

    return read


@pytest.fixture
def samples(tmp_path):
    return tmp_path / "run" / "samples"


def sheet(samples, step, name="reconstructions"):
    return np.asarray(Image.open(samples / f"{name}-{step:06d}.png"))


# When


def test_samples_are_drawn_every_so_many_steps_and_at_the_end(make_trainer, samples):
    make_trainer(max_steps=5).train()
    names = sorted(path.name for path in samples.iterdir())
    assert names == [f"reconstructions-00000{step}.png" for step in (2, 4, 5)]


def test_no_samples_are_drawn_unless_asked_for(make_trainer, samples):
    make_trainer(sample_steps=0).train()
    assert not samples.exists()


@pytest.mark.parametrize("stage", ["tokenizer", "caption", "drawing", "semantic"])
def test_sampling_does_not_change_training(make_trainer, make_stage, stage):
    make = make_trainer if stage == "tokenizer" else lambda **changes: make_stage(stage, **changes)
    with_samples, without = make(sample_steps=1), make(sample_steps=0)
    for trainer in (with_samples, without):
        trainer.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (with_samples, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    torch.testing.assert_close(with_samples.model.state_dict(), without.model.state_dict(), rtol=0, atol=0)


def test_sampling_does_not_change_which_random_numbers_follow(make_stage):
    trainer = make_stage("drawing", max_steps=1)
    trainer.train()
    sampler = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "SamplesCallback")
    before = torch.get_rng_state()
    sampler.on_step_end(trainer.args, trainer.state, trainer.control)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_negative_number_of_steps_is_an_error(arguments):
    with pytest.raises(ValueError, match="sample_steps is -1; expected a number of steps, or 0 for none"):
        arguments(sample_steps=-1)


# Reconstructions


def test_a_sheet_has_the_same_images_above_and_reconstructions_below(make_trainer, make_items, samples):
    trainer, items = make_trainer(), make_items()
    trainer.train()
    for step in (2, 3):
        drawn = sheet(samples, step)
        assert drawn.shape == (2 * (16 + FRAME) + FRAME, 4 * (16 + FRAME) + FRAME, 3)
        for column, item in enumerate(items):
            left = FRAME + column * (16 + FRAME)
            original = drawn[FRAME : FRAME + 16, left : left + 16]
            assert np.array_equal(original, item["pixel_values"][0].permute(1, 2, 0).numpy())
    pixels = first_images(items, 4)
    with torch.no_grad():
        last = trainer.model.eval()(pixels[3:]).sample[0].clamp(-1, 1)
    expected = ((last + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(drawn[-16 - FRAME : -FRAME, -16 - FRAME : -FRAME] - expected).max() <= 0.51


def test_a_sheet_shows_at_most_eight_images(make_items):
    assert first_images(make_items(20), 8).shape == (8, 3, 16, 16)


def test_a_sheet_is_of_the_averaged_weights(make_trainer, make_vision_tokenizer, make_items, samples):
    # An average that hardly moves is still that of the initial weights.
    make_trainer(ema_decay=1 - 1e-9, learning_rate=1e-2).train()
    expected = draw_sheet(make_vision_tokenizer(), first_images(make_items(), 8)).permute(1, 2, 0).numpy()
    assert np.abs(sheet(samples, 3).astype(int) - expected).max() <= 1


def test_data_without_images_have_no_sheet():
    with pytest.raises(ValueError, match=r"training data have none; set training\.sample_steps=0"):
        first_images([{"input_ids": [1]}], 8)


# Answers and drawings


@pytest.mark.parametrize("codes", [False, True])
def test_answers_stand_beside_those_of_the_data_below_their_images(make_stage, make_items, samples, codes):
    trainer = make_stage("caption", codes=codes)
    trainer.train()
    assert sheet(samples, 3, "answers").shape == (16 + 2 * FRAME, 4 * (16 + FRAME) + FRAME, 3)
    lines = (samples / "answers-000003.md").read_text().splitlines()
    assert lines[:4] == [
        "![](answers-000003.png)",
        "",
        "| request | the model's answer | the data's |",
        "|---|---|---|",
    ]
    inputs = question_of(make_items(codes=codes)[1], trainer.model)["inputs"]
    answer = trainer.model.eval().generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, 18:].tolist()
    expected = make_items()[1]["input_ids"][18:]
    assert lines[5] == f"| 5 6 | {' '.join(map(str, answer))} | {' '.join(map(str, expected))} |"


def test_a_tokenizer_that_learns_in_a_whole_model_is_shown_beside_the_answers(make_stage, samples):
    make_stage("semantic", max_steps=1).train()
    names = sorted(path.name for path in samples.iterdir())
    assert names == ["answers-000001.md", "answers-000001.png", "reconstructions-000001.png"]


def test_a_question_ends_before_the_first_answer_and_takes_its_own_images(make_model, make_items):
    one, two = make_items(2)
    item = {
        "input_ids": [*one["input_ids"][:18], 20, 21, 22, 1, *two["input_ids"][:18], 23, 1],
        "labels": [-100] * 20 + [22, 1] + [-100] * 18 + [23, 1],
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
    }
    question = question_of(item, make_model())
    assert question["request"] == item["input_ids"][:20] and question["answer"] == [22, 1]
    assert question["inputs"]["pixel_values"].shape == (1, 3, 16, 16)


def test_what_is_predicted_from_its_first_token_on_asks_nothing(make_model):
    assert question_of({"input_ids": [7, 8], "labels": [7, 8]}, make_model()) is None


def test_drawings_stand_above_their_prompts(make_stage, samples):
    make_stage("drawing").train()
    assert sheet(samples, 3, "drawings").shape == (16 + 2 * FRAME, 4 * (16 + FRAME) + FRAME, 3)
    lines = (samples / "drawings-000003.md").read_text().splitlines()
    assert lines == ["![](drawings-000003.png)", "", *(f"{n + 1}. 11 {12 + n} 5" for n in range(4))]


def test_a_drawing_differs_between_steps_only_by_what_was_learned(make_stage, samples):
    make_stage("drawing", sample_steps=1, learning_rate=0.0).train()
    assert np.array_equal(sheet(samples, 1, "drawings"), sheet(samples, 3, "drawings"))


# TensorBoard


def test_curves_and_sheets_go_to_tensorboard(make_trainer, board):
    trainer = make_trainer(report_to="tensorboard")
    trainer.train()
    read = board()
    for name in ("vq_loss", "discriminator_loss", "codebook_usage", "codebook_perplexity", "grad_norm/discriminator"):
        expected = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        curve = [(point.step, point.value) for point in read.Scalars(f"train/{name}")]
        assert len(curve) == 3
        assert curve == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert [image.step for image in read.Images("reconstructions")] == [2, 3]


def test_answers_go_to_tensorboard_as_text_and_images(make_stage, board):
    make_stage("caption", report_to="tensorboard", max_steps=2).train()
    read = board()
    assert [image.step for image in read.Images("answers")] == [2]
    (text,) = read.Tensors("answers/text_summary")
    assert text.step == 2 and b"the model's answer" in text.tensor_proto.string_val[0]


def test_a_resumed_run_goes_on_in_the_same_curves(make_trainer, board, tmp_path):
    saving = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2}
    make_trainer(**saving).train()
    make_trainer(**saving).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [point.step for point in board().Scalars("train/vq_loss")] == [1, 2, 3]


def test_curves_go_on_where_the_clock_was_set_back(make_trainer, board, tmp_path, monkeypatch):
    saving = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2}
    make_trainer(**saving).train()
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 3600)
    make_trainer(**saving, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [point.step for point in board().Scalars("train/vq_loss")] == [1, 2, 3, 4]


def test_event_files_keep_their_order_before_a_new_one(tmp_path):
    now = int(time.time())
    for name, age in (("a", 100), ("b", -50), ("c", -50)):
        (tmp_path / f"events.out.tfevents.{now - age}.host.{name}").touch()
    put_before_now(tmp_path)
    times = {path.name[-1]: int(path.name.split(".")[3]) for path in tmp_path.iterdir()}
    assert times["a"] == now - 100 and times["a"] < times["b"] < times["c"] < time.time()


def test_gradient_norms_are_logged_without_a_limit_and_change_nothing(make_trainer):
    trainers = [make_trainer(max_grad_norm=limit, sample_steps=0) for limit in (0.0, 1e9)]
    for trainer in trainers:
        trainer.train()
    logs = [
        [
            (entry["grad_norm"], entry["grad_norm/discriminator"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        for trainer in trainers
    ]
    assert len(logs[0]) == 3 and all(norm > 0 for entry in logs[0] for norm in entry)
    assert logs[0] == logs[1]
    for states in (
        [trainer.model.state_dict() for trainer in trainers],
        [trainer.adversary.discriminator.state_dict() for trainer in trainers],
    ):
        torch.testing.assert_close(*states, rtol=0, atol=0)
