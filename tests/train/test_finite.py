"""Losses, gradients and weights that are no numbers: the run stops in time, and says where they came from."""

import json
import math

import pytest
import torch
from transformers import TrainerCallback

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.train import NonFiniteLossError, newest_checkpoint
from ett.train.checkpointing.finite import describe_findings

from .trainers import changed, make_trainer, snapshot


@pytest.fixture
def trainer(make_vision_tokenizer, arguments, make_items):
    """A tokenizer's trainer of three steps of two micro-batches of two images each, saved after each step."""
    items = [{**item, "name": f"{index}.png"} for index, item in enumerate(make_items(12))]
    args = arguments(save_strategy="steps", save_steps=1, max_steps=3, gradient_accumulation_steps=2)
    return make_trainer(make_vision_tokenizer(), args, items)


@pytest.fixture
def spoil(monkeypatch):
    """Makes the loss of a trainer's n-th micro-batch another number, as if one of its terms were that."""

    def spoil(trainer, number, term, value):
        compute, calls = trainer.compute_loss, []

        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            calls.append(loss)
            if len(calls) != number:
                return loss
            trainer._record(term, torch.tensor(value))
            return loss * value

        monkeypatch.setattr(trainer, "compute_loss", compute_loss)

    return spoil


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_before_a_step_whose_loss_is_no_number(trainer, spoil, tmp_path, value):
    spoil(trainer, 4, "entropy_loss", value)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(f"Step 2: entropy_loss is {value} in micro-batch 2; loss is {value} in micro-batch 2;")
    assert "the gradients of vision_tokenizer are not finite" in message
    assert "the last checkpoint is checkpoint-1" in message
    saved = IBQModel.from_pretrained(newest_checkpoint(tmp_path / "run"))
    assert changed(snapshot(saved), trainer.model) == set()


def test_the_report_names_the_examples_of_the_micro_batch(trainer, spoil, monkeypatch, tmp_path):
    names, take = [], trainer.training_step
    monkeypatch.setattr(
        trainer,
        "training_step",
        lambda model, inputs, *rest: names.append(inputs["names"]) or take(model, inputs, *rest),
    )
    spoil(trainer, 3, "entropy_loss", math.nan)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    assert f"(examples: {', '.join(names[2])})" in str(caught.value)
    report = json.loads((tmp_path / "run" / "non-finite-step-2.json").read_text())
    assert report["step"] == 2
    assert {"name": "entropy_loss", "micro_batch": 1, "value": "nan"} in report["processes"][0]["losses"]
    assert report["processes"][0]["examples"]["1"] == names[2]


def test_a_part_whose_gradient_is_no_number_is_named_though_losses_are_finite(
    make_model, arguments, make_items, tmp_path
):
    model = make_model()
    next(model.model.projector.parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = snapshot(model)
    with pytest.raises(NonFiniteLossError, match=r"^Step 1: the gradients of projector are not finite\. Training"):
        make_trainer(model, arguments(), make_items()).train()
    assert changed(before, model) == set()
    report = json.loads((tmp_path / "run" / "non-finite-step-1.json").read_text())
    assert report["processes"][0]["losses"] == []
    assert report["processes"][0]["gradients"]["language_model"] == "finite"


@pytest.mark.parametrize("part", ["vision_tokenizer", "discriminator", "average"])
def test_weights_that_are_no_numbers_are_not_saved(make_vision_tokenizer, arguments, make_items, tmp_path, part):
    args = arguments(save_strategy="steps", save_steps=1, max_steps=3, ema_decay=0.5)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items(8))
    weights = {
        "vision_tokenizer": trainer.model.parameters,
        "discriminator": trainer.adversary.discriminator.parameters,
        "average": lambda: trainer.average.weights.values(),
    }[part]

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                next(iter(weights())).data[0] = math.nan

    trainer.add_callback(Spoil())
    with pytest.raises(NonFiniteLossError, match=f"After step 2, weights of {part} are not finite; no checkpoint"):
        trainer.train()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-1"
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_finite_training_leaves_no_report(trainer, tmp_path):
    trainer.train()
    assert list((tmp_path / "run").glob("non-finite*")) == []


def test_of_several_processes_the_examples_are_those_of_the_one_whose_loss_is_no_number():
    shared = {"projector": "not finite"}
    whole = {"losses": [], "gradients": shared, "examples": {"1": ["a"], "2": ["b"]}}
    broken = {"losses": [{"name": "loss", "micro_batch": 2, "value": "nan"}], "gradients": shared}
    told = describe_findings(7, [whole, {**broken, "examples": {"2": ["c", "d"]}}])
    assert told == "Step 7: loss is nan in micro-batch 2; the gradients of projector are not finite (examples: c, d)."
