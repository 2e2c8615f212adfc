"""Models in shards: what is refused before anything starts, and the model in one piece at the end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from ett.train import Recipe, run, train_only
from ett.train.models.adapters import add_adapter, has_adapter
from ett.train.recipes import LoraSection
from ett.train.sharding import DEEPSPEED_CONFIGS, check_sharding, find_deepspeed_config, require_shards


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"muon_rate_factor": 3.0}, "Muon needs whole matrices, which training.fsdp cuts"),
        ({"fsdp_config": {"version": 1}}, "training.fsdp is FSDP2 only"),
    ],
)
def test_what_shards_cannot_have_is_an_error(make_model, arguments, fields, message):
    with pytest.raises(ValueError, match=message):
        check_sharding(make_model(), arguments(fsdp=True, **fields))


def test_a_tokenizer_alone_is_not_cut_into_shards(make_vision_tokenizer, arguments):
    with pytest.raises(ValueError, match=r"small enough for every device; leave training\.fsdp out"):
        check_sharding(make_vision_tokenizer(), arguments(fsdp=True))


def test_where_accelerate_shards_nothing_fsdp_is_an_error(arguments):
    """DDP would train instead."""
    trainer = SimpleNamespace(args=arguments(fsdp=True), is_fsdp_enabled=False)
    with pytest.raises(ValueError, match="shards models over accelerators, and this run is on the cpu; leave it out"):
        require_shards(trainer)


def test_a_torch_that_cannot_reduce_unused_parameters_has_no_fsdp(make_model, arguments, monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(ValueError, match=r"training\.fsdp needs torch 2\.13 or newer"):
        check_sharding(make_model(), arguments(fsdp=True))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_ddp_looks_for_unused_parameters_wherever_checkpointing_allows_it(arguments, reentrant):
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    args = arguments(gradient_checkpointing=True, **options)
    assert args.ddp_find_unused_parameters is not bool(reentrant)


def test_a_deepspeed_configuration_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"training.deepspeed is 'zero9'; expected zero2 or zero3, or a file"):
        find_deepspeed_config("zero9")


def test_without_deepspeed_it_is_told_how_to_install_it(monkeypatch):
    monkeypatch.setattr("ett.train.sharding.is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install ett\[deepspeed\]; or use training\.fsdp=true"):
        find_deepspeed_config("zero2")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_configuration_is_found_by_its_name(monkeypatch, stage):
    monkeypatch.setattr("ett.train.sharding.is_deepspeed_available", lambda: True)
    path = find_deepspeed_config(f"zero{stage}")
    assert path == str(DEEPSPEED_CONFIGS / f"zero{stage}.json")
    assert json.loads(Path(path).read_text())["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({}, {"ema_decay": 0.9}, r"keeps the weights to itself; set training\.ema_decay=null"),
        ({}, {"adaptive_adversarial_weight": True}, r"set training\.adaptive_adversarial_weight=false"),
        ({}, {"fp16": True}, r"set training\.fp16=false and training\.bf16=true"),
        ({}, {"muon_rate_factor": 3.0}, r"Muon needs whole matrices, which training\.deepspeed cuts"),
        ({"bf16": {"enabled": "auto"}}, {"bf16": True}, r"have bf16\.enabled, but that would round the tokenizer"),
        ({"optimizer": {"type": "AdamW"}}, {}, "have optimizer, but the optimizer is the recipe's. Remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "have scheduler, but the schedule is the recipe's"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}, "have .*offload_optimizer"),
        ({"zero_optimization": {"stage": 0}}, {}, "ZeRO's stage 0; expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3}}, {}, "need .*stage3_gather_16bit_weights_on_model_save=true"),
    ],
)
def test_what_deepspeed_cannot_have_is_an_error(make_model, arguments, settings, fields, message):
    pytest.importorskip("deepspeed")
    args = arguments(deepspeed={"zero_optimization": {"stage": 2}, **settings}, **fields)
    with pytest.raises(ValueError, match=message):
        check_sharding(make_model(), args)


def test_for_zero3_models_are_made_in_one_piece(make_model, arguments):
    pytest.importorskip("deepspeed")
    args = arguments(deepspeed=find_deepspeed_config("zero3"))
    check_sharding(make_model(), args)
    assert all(parameter.numel() for parameter in make_model().parameters())


@pytest.mark.parametrize("rank", [None, 4])
def test_the_model_in_one_piece_has_the_weights_and_what_trains(make_model, rank):
    recipe = Recipe(train=["projector", "language_model"], lora=LoraSection(rank=rank))
    sharded = make_model()
    if rank:
        add_adapter(sharded, recipe.lora)
    train_only(sharded, recipe.train)
    model = run.model_of(sharded.state_dict(), sharded, recipe)
    assert has_adapter(model) == bool(rank)
    torch.testing.assert_close(model.state_dict(), sharded.state_dict(), rtol=0, atol=0)
    trained = [{name for name, value in each.named_parameters() if value.requires_grad} for each in (model, sharded)]
    assert trained[0] == trained[1]
