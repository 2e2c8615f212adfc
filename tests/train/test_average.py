"""The moving average of the weights: how it moves, who uses it, and that it survives an interruption."""

import pytest
import safetensors.torch
import torch

from ett.train import ETTCollator, ETTTrainer, train_only

from .trainers import snapshot, timeless

DECAY = 0.75


@pytest.fixture
def make_trainer(make_vision_tokenizer, arguments, make_items):
    """Makes a trainer of a tokenizer with a moving average, or with another model."""

    def make(model=None, **changes):
        args = arguments(**{"ema_decay": DECAY, **changes})
        model = model or make_vision_tokenizer()
        return ETTTrainer(model=model, args=args, train_dataset=make_items(8), data_collator=ETTCollator())

    return make


def assert_equal(ours, theirs):
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def test_the_average_starts_from_the_initial_weights_and_follows_each_step(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=3)
    weights = [snapshot(trainer.model)]
    record = trainer.callback_handler.on_step_end
    monkeypatch.setattr(
        trainer.callback_handler, "on_step_end", lambda *args: weights.append(snapshot(trainer.model)) or record(*args)
    )
    trainer.train()
    expected = weights[0]
    for step in weights[1:]:
        expected = {name: DECAY * value + (1 - DECAY) * step[name] for name, value in expected.items()}
    assert len(weights) == 4
    torch.testing.assert_close(trainer.average.weights, expected, rtol=1e-5, atol=1e-7)


def test_the_average_is_of_what_trains(make_trainer, make_model):
    model = make_model()
    train_only(model, ["vision_tokenizer"])
    trainer = make_trainer(model)
    trainer.train()
    assert set(trainer.average.weights) == {name for name in model.state_dict() if "vision_tokenizer." in name}


def test_averaging_does_not_change_the_course_of_training(make_trainer):
    averaged, plain = make_trainer(), make_trainer(ema_decay=None)
    for trainer in (averaged, plain):
        trainer.train()
    assert plain.average is None
    assert_equal(averaged.model.state_dict(), plain.model.state_dict())


def test_within_averaged_weights_the_model_has_them_and_afterwards_its_own(make_trainer):
    trainer = make_trainer()
    trainer.train()
    own = snapshot(trainer.model)
    average = {name: value.clone() for name, value in trainer.average.weights.items()}
    with pytest.raises(KeyboardInterrupt), trainer.averaged_weights():
        assert_equal(trainer.model.state_dict(), average)
        raise KeyboardInterrupt
    assert_equal(trainer.model.state_dict(), own)
    assert_equal(trainer.average.weights, average)


def test_evaluation_is_of_the_average(make_trainer, make_vision_tokenizer, make_items):
    trainer = make_trainer(adversarial_weight=0.0, learning_rate=1e-2)
    trainer.train()
    averaged = make_vision_tokenizer()
    averaged.load_state_dict(trainer.average.weights)
    expected = make_trainer(averaged, adversarial_weight=0.0, ema_decay=None).evaluate(make_items())["eval_loss"]
    own = make_trainer(trainer.model, adversarial_weight=0.0, ema_decay=None).evaluate(make_items())["eval_loss"]
    assert trainer.evaluate(make_items())["eval_loss"] == expected != own


def test_a_resumed_run_with_an_average_is_the_uninterrupted_one_to_the_last_bit(make_trainer, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**saving)
    whole.train()
    torch.manual_seed(123)
    resumed = make_trainer(**saving, output_dir=str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    pairs = [(trainer.model, trainer.adversary.discriminator) for trainer in (resumed, whole)]
    for ours, theirs in zip(*pairs, strict=True):
        assert_equal(ours.state_dict(), theirs.state_dict())
    assert_equal(resumed.average.weights, whole.average.weights)
    assert resumed.adversary.discriminator.lecam_real.item() == whole.adversary.discriminator.lecam_real.item() != 0
    states = [trainer.adversary.optimizer.state_dict()["state"] for trainer in (resumed, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    logs = [timeless(trainer.state.log_history) for trainer in (resumed, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_a_checkpoint_holds_the_weights_as_trained_and_the_average_beside_them(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    own = safetensors.torch.load_file(checkpoint / "diffusion_pytorch_model.safetensors")
    assert_equal(own, trainer.model.state_dict())
    assert_equal(safetensors.torch.load_file(checkpoint / "average.safetensors"), trainer.average.weights)


@pytest.mark.parametrize("decay", [0, 1, 1.5, -0.1])
def test_a_decay_out_of_range_is_an_error(arguments, decay):
    with pytest.raises(ValueError, match=r"ema_decay is .*; expected a number between 0 and 1, or null"):
        arguments(ema_decay=decay)
