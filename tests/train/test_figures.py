"""Figures beside the losses: throughput, model FLOPs, gradient norms and learning rates by part."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ett.train import ETTCollator, train_only
from ett.train.monitoring.figures import count_tokens
from ett.train.objective.discriminator import PatchDiscriminator
from ett.train.planning.flops import StepFlops, peak_of

from .trainers import make_trainer

LINEAR = ("mm", "addmm", "bmm")


def history(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told to go on."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("ett.train.monitoring.figures.time.perf_counter", lambda: Clock.now)
    return Clock


# Model FLOPs


@pytest.mark.parametrize("parts", [["projector"], ["projector", "language_model"]])
def test_flops_of_a_language_model_are_those_of_its_products(make_model, make_items, parts):
    """Counted by torch, forward and backward; attention apart, of which torch counts the unseen half, or nothing."""
    model = make_model().train()
    train_only(model, parts)
    item = make_items(2, codes=True)[1]
    batch = ETTCollator()([item, item])
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    counted = sum(
        flops
        for operator, flops in counter.get_flop_counts()["Global"].items()
        if any(n in str(operator) for n in LINEAR)
    )
    flops = StepFlops(model)
    positions, _, labels, _ = count_tokens(batch, 0).tolist()
    assert (positions, labels) == (44, 8)
    if "language_model" in parts:
        # The gradient of the head is added in place, which torch does not count.
        counted += labels * 2 * 32 * 40
    assert counted == positions * flops.of_position + labels * flops.of_label + 32 * flops.of_code


def test_the_codes_of_an_index_model_cost_no_product(make_model):
    assert StepFlops(make_model(visual_embedding="index")).of_code == 0


def test_flops_of_attention_count_what_a_position_sees(make_model):
    model = make_model()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.language_model(inputs_embeds=torch.zeros(1, 10, 32))
    whole = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    # Forward and twice as much backward, for 55 of 100 pairs.
    assert StepFlops(model).of_pair * 55 == pytest.approx(3 * whole * 55 / 100)


def test_flops_of_a_frozen_tokenizer_are_its_encoders_and_one_product(make_model):
    model = make_model()
    train_only(model, ["projector"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.vision_tokenizer.encode(torch.zeros(1, 3, 16, 16))
    assert StepFlops(model).of_image(16, 16) == counter.get_total_flops() + 2 * 16 * 32 * 8


def test_flops_of_a_tokenizer_that_learns_have_three_passes(make_vision_tokenizer):
    tokenizer = make_vision_tokenizer()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        latents = tokenizer.encode(torch.zeros(1, 3, 16, 16)).latents
        tokenizer.decode(latents, force_not_quantize=True)
    assert StepFlops(tokenizer).of_image(16, 16) == 3 * counter.get_total_flops() + 6 * 2 * 16 * 32 * 8


def test_flops_of_the_discriminator_are_those_of_both_its_roles(make_vision_tokenizer):
    discriminator = PatchDiscriminator(width=8, num_layers=1)
    real, fake = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        discriminator(real).sum().backward()
        discriminator(fake.detach()).sum().backward()
        discriminator.requires_grad_(False)(fake).sum().backward()
    first_layer = 2 * 64 * 8 * 3 * 16
    # Neither image gets a gradient while the discriminator itself learns.
    counted = counter.get_total_flops() + 2 * first_layer
    assert StepFlops(make_vision_tokenizer(), discriminator=discriminator).of_judged_image(16, 16) == counted


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Unheard of", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name, peak):
    assert peak_of(name) == peak


# Throughput


def test_tokens_are_counted_without_padding(make_items):
    short, long = make_items(2, codes=True)
    counts = count_tokens(ETTCollator()([short, long]), 0)
    assert counts.tolist() == [19 + 22, 19 * 20 // 2 + 22 * 23 // 2, 1 + 4, 0]


def test_pairs_of_branches_are_those_that_see_each_other():
    items = [
        {"input_ids": [7, 8, 9, 9], "labels": [-100, 8, -100, 9], "branches": [0, 0, 1, 2]},
        {"input_ids": [7], "labels": [7], "branches": [0]},
    ]
    assert count_tokens(ETTCollator()(items), 0).tolist() == [5, 1 + 2 + 3 + 3 + 1, 3, 0]


def test_a_pause_in_which_figures_are_taken_does_not_shorten_the_next(make_model, make_items, arguments, clock):
    model = make_model()
    train_only(model, ["projector"])
    items = make_items(codes=True)
    trainer = make_trainer(model, arguments(), items)
    batch = ETTCollator()(items[:2])
    trainer.throughput.count(batch)
    clock.now += 1
    with trainer.throughput.paused():
        trainer.throughput.take()
        clock.now += 100
    trainer.throughput.count(batch)
    clock.now += 4
    assert trainer.throughput.take()["images_per_second"] == 0.5


def test_throughput_is_what_a_step_took_in_by_its_time(make_model, make_items, arguments, clock):
    model = make_model()
    train_only(model, ["projector"])
    items = make_items(codes=True)
    trainer = make_trainer(model, arguments(peak_flops=1e6), items)
    trainer.model.train()
    batch = ETTCollator()(items[:2])
    trainer.throughput.count(batch)
    clock.now += 1.5
    with trainer.throughput.paused():
        clock.now += 100
    trainer.throughput.count(batch)
    clock.now += 0.5
    figures = trainer.throughput.take()
    assert figures["images_per_second"] == 2.0
    assert figures["tokens_per_second"] == 41.0
    flops = StepFlops(model)
    expected = 41 * flops.of_position + (190 + 253) * flops.of_pair + 5 * flops.of_label + 32 * flops.of_code
    assert figures["model_tflops_per_second"] == pytest.approx(expected / 1e12)
    assert figures["mfu"] == pytest.approx(expected / 1e6)
    assert trainer.throughput.take() == {}


def test_throughput_is_logged_and_a_share_of_an_unknown_peak_is_not(make_vision_tokenizer, make_items, arguments):
    items = [{"pixel_values": item["pixel_values"]} for item in make_items()]
    trainer = make_trainer(make_vision_tokenizer(), arguments(), items)
    trainer.train()
    for entry in history(trainer):
        assert entry["images_per_second"] > 0 and entry["model_tflops_per_second"] > 0
        assert not {"tokens_per_second", "mfu", "peak_memory_gib"} & set(entry)


# Gradient norms and learning rates


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e9])
def test_the_parts_gradient_norms_make_up_the_whole_before_clipping(make_model, make_items, arguments, limit):
    model = make_model()
    train_only(model, ["vision_tokenizer", "projector"])
    trainer = make_trainer(model, arguments(max_grad_norm=limit), make_items())
    trainer.train()
    for entry in history(trainer):
        parts = {name: value for name, value in entry.items() if name.startswith("grad_norm/")}
        assert set(parts) == {"grad_norm/vision_tokenizer", "grad_norm/projector", "grad_norm/discriminator"}
        del parts["grad_norm/discriminator"]
        assert math.hypot(*parts.values()) == pytest.approx(entry["grad_norm"], rel=1e-4)


def test_learning_rates_are_logged_by_part(make_model, make_items, arguments):
    rates = {"part_learning_rates": {"projector": 0.5}, "muon_rate_factor": 2.0, "discriminator_learning_rate": 0.25}
    trainer = make_trainer(make_model(), arguments(**rates), make_items())
    trainer.train()
    logged = {name: value for name, value in history(trainer)[0].items() if name.startswith("learning_rate/")}
    assert logged == {
        "learning_rate/vision_tokenizer": 1e-3,
        "learning_rate/vision_tokenizer/muon": 2e-3,
        "learning_rate/projector": 0.5,
        "learning_rate/projector/muon": 1.0,
        "learning_rate/language_model": 1e-3,
        "learning_rate/language_model/muon": 2e-3,
        "learning_rate/visual_head": 1e-3,
        "learning_rate/discriminator": 0.25,
    }
