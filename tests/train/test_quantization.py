"""The language model in 4 bits: what is rounded, what learns beside it, and that no rounding is left in the end."""

import json

import pytest
import safetensors.torch
import torch

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.train import load_recipe, run_recipe
from ett.train.models.building import build_model
from ett.train.models.quantization import check_quantization
from ett.train.planning.plan import plan_recipe

from .test_run import TINY

bitsandbytes = pytest.importorskip("bitsandbytes")

SETTINGS = ["lora.rank=4", "lora.alpha=32", "training.learning_rate=1e-2", "model.load_in_4bit=true"]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished folder: adapters trained beside 4 bits, then merged into the weights that were rounded."""
    changes = [*TINY, f"model.path={base}", *SETTINGS]
    return run_recipe("lora_gen", changes, tmp_path_factory.mktemp("runs") / "finished", progress=False)


@pytest.fixture
def model(base):
    recipe = load_recipe("lora_gen", [*TINY, f"model.path={base}", *SETTINGS])
    return build_model(recipe, [])[0]


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_the_linear_maps_of_the_language_model_are_rounded_and_nothing_else_is(model):
    rounded = {name for name, value in model.named_parameters() if isinstance(value, bitsandbytes.nn.Params4bit)}
    maps = {name for name, module in model.model.language_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert rounded == {f"model.language_model.{name}.weight" for name in maps}
    assert {value.dtype for name, value in model.named_parameters() if name not in rounded} == {torch.float32}


def test_what_is_rounded_are_the_folders_weights_to_normal_floats(model, base):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    rounded, _ = bitsandbytes.functional.quantize_4bit(weights(base)[name], quant_type="nf4", compress_statistics=True)
    assert torch.equal(model.get_parameter(name).data, rounded)


def test_samples_may_be_drawn_while_it_trains(base, tmp_path):
    changes = [*TINY, f"model.path={base}", *SETTINGS, "training.sample_steps=1"]
    folder = run_recipe("lora_gen", changes, tmp_path / "sampled", progress=False)
    assert len(json.loads((folder / "training.json").read_text())["history"]) >= 2


def test_the_finished_model_differs_from_the_start_by_the_adapters_alone(finished, base):
    start, end = weights(base), weights(finished)
    adapter = safetensors.torch.load_file(finished / "adapter" / "adapter_model.safetensors")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        key = f"model.language_model.layers.1.{name}"
        down, up = (adapter[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
        assert up.abs().max() > 0
        torch.testing.assert_close(end[f"{key}.weight"], start[f"{key}.weight"] + 32 / 4 * up @ down)
    assert torch.equal(end["model.language_model.norm.weight"], start["model.language_model.norm.weight"])


def test_the_finished_model_is_an_ordinary_one(finished):
    model = ETTForConditionalGeneration.from_pretrained(finished)
    assert not getattr(model, "is_quantized", False)
    assert "quantization_config" not in json.loads((finished / "config.json").read_text())


def test_the_record_counts_weights_and_not_bytes(finished, base):
    parts = json.loads((finished / "training.json").read_text())["parts"]
    start = weights(base)
    expected = sum(value.numel() for name, value in start.items() if "language_model" in name or "lm_head" in name)
    assert parts["language_model"] == {"parameters": expected, "trained": False}


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(base, tmp_path):
    changes = [*TINY, f"model.path={base}", *SETTINGS, "training.max_steps=3", "training.save_steps=1"]
    through = run_recipe("lora_gen", [*changes, "training.save_total_limit=5"], tmp_path / "through", progress=False)
    again = tmp_path / "again"
    (again / "training").mkdir(parents=True)
    for name in ("recipe.yaml", "checkpoint-1"):
        (through / "training" / name).rename(again / "training" / name)
    run_recipe("lora_gen", [*changes, "training.save_total_limit=5"], again, progress=False)
    torch.testing.assert_close(weights(again), weights(through), rtol=0, atol=0)


def test_a_plan_counts_half_a_byte_and_the_scales(base):
    settings = [*TINY, f"model.path={base}", "lora.rank=4"]
    whole, rounded = (
        plan_recipe("lora_gen", [*settings, f"model.load_in_4bit={value}"], devices=1).memory["weights"]
        for value in ("false", "true")
    )
    # Two layers of four maps 32 x 32 and three 32 x 64.
    assert whole - rounded == round((4 - 0.5 - 1 / 64 - 1 / 4096) * 2 * (4 * 32 * 32 + 3 * 32 * 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rank=null", r"model\.load_in_4bit needs adapters.*: give lora\.rank"),
        ("model.path=null", r"model\.load_in_4bit needs an ETT model's folder \(model\.path\)"),
        ("training.fsdp=true", r"leave training\.fsdp out, or set model\.load_in_4bit=false"),
    ],
)
def test_what_4_bits_cannot_be_combined_with_is_an_error(change, message):
    recipe = load_recipe("lora_gen", ["model.path=somewhere", *SETTINGS, change])
    with pytest.raises(ValueError, match=message):
        check_quantization(recipe)


def test_without_bitsandbytes_it_is_told_how_to_install_it(monkeypatch):
    monkeypatch.setattr("ett.train.models.quantization.is_bitsandbytes_available", lambda: False)
    recipe = load_recipe("lora_gen", ["model.path=somewhere", *SETTINGS])
    with pytest.raises(ValueError, match=r"pip install ett\[bitsandbytes\]"):
        check_quantization(recipe)
