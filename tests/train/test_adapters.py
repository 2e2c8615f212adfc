"""Low-rank adapters: what moves, what a folder holds, that merging changes nothing, and runs from a recipe."""

import json

import pytest
import safetensors.torch
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import ett  # noqa: F401 - makes the Auto classes know ETT
from ett.cli import app
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.train import ETTCollator, run_recipe, train_only
from ett.train.models.adapters import add_adapter, merge_adapter, merge_folder, save_adapter
from ett.train.recipes import LoraSection

from .test_run import TINY
from .trainers import changed, make_trainer, snapshot

PARTS = ["projector", "language_model", "visual_head"]
MAPS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def with_adapter(make_model, parts=PARTS, **section):
    model = make_model()
    add_adapter(model, LoraSection(**{"rank": 4, **section}))
    train_only(model, parts)
    return model


def shaken(model):
    """The model with an adapter that does something, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model, items):
    batch = ETTCollator()(items)
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_every_linear_map_of_the_language_model_gets_one_and_nothing_else_does(make_model):
    model = with_adapter(make_model)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {
        f"model.language_model.layers.{layer}.{block}.{name}"
        for layer in range(2)
        for name in MAPS
        for block in ["self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"]
    }


def test_at_first_the_model_is_what_it_was(make_model, make_items):
    assert torch.equal(logits(with_adapter(make_model), make_items()), logits(make_model(), make_items()))


def test_language_model_stands_for_its_adapter_in_what_trains(make_model):
    model = make_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    add_adapter(model, LoraSection(rank=2))
    told = train_only(model, PARTS)
    assert {part for part, (_, trained) in told.items() if trained} == {"adapter", "projector", "visual_head"}
    # Attention's four maps are 32 x 32, the MLP's three 32 x 64, in two layers.
    assert told["adapter"][0] == 2 * (4 * 2 * (32 + 32) + 3 * 2 * (32 + 64))
    assert sum(count for count, _ in told.values()) == size + told["adapter"][0]


@pytest.mark.parametrize("parts", [["projector", "language_model"], ["vision_tokenizer", "language_model"]])
def test_training_moves_adapters_and_full_parts_and_leaves_the_rest_to_the_last_bit(
    make_model, arguments, make_items, parts
):
    model = with_adapter(make_model, parts)
    before = snapshot(model)
    make_trainer(model, arguments(), make_items()).train()
    expected = {name for name in before if ".lora_" in name or any(f"model.{part}." in name for part in parts[:1])}
    assert changed(before, model) == expected


def test_gradient_checkpointing_changes_no_update(make_model, arguments, make_items):
    updated = []
    for checkpointing in (False, True):
        model = with_adapter(make_model)
        args = arguments(gradient_checkpointing=checkpointing, optim="sgd", learning_rate=0.1)
        make_trainer(model, args, make_items(codes=True), predicts_codes=True).train()
        updated.append(snapshot(model))
    torch.testing.assert_close(updated[1], updated[0], rtol=1e-5, atol=1e-6)


def test_adapters_have_a_learning_rate_of_their_own(make_model, arguments, make_items):
    model = with_adapter(make_model)
    trainer = make_trainer(model, arguments(part_learning_rates={"adapter": 5e-2}), make_items())
    groups = trainer.create_optimizer().param_groups
    assert sorted(group["lr"] for group in groups) == [1e-3, 1e-3, 5e-2]


def test_merged_and_unmerged_give_the_same(make_model, make_items):
    model = shaken(with_adapter(make_model, alpha=16))
    expected, plain = logits(model, make_items()), logits(make_model(), make_items())
    merge_adapter(model)
    assert set(model.state_dict()) == set(make_model().state_dict())
    torch.testing.assert_close(logits(model, make_items()), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(expected, plain, atol=1e-2)


def test_peft_reads_the_adapters_folder(make_model, make_items, tmp_path):
    base, model = make_model(), shaken(with_adapter(make_model))
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, make_items()), logits(model, make_items()))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(make_model, arguments, make_items, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(with_adapter(make_model, dropout=0.3), arguments(**options), make_items(8))
    whole.train()
    torch.manual_seed(123)
    args = arguments(**options, output_dir=str(tmp_path / "again"))
    resumed = make_trainer(with_adapter(make_model, dropout=0.3), args, make_items(8))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert changed(whole.model.state_dict(), resumed.model) == set()


def test_a_checkpoint_holds_what_trains_and_no_more(make_model, arguments, make_items, tmp_path):
    model = with_adapter(make_model)
    make_trainer(model, arguments(max_steps=1, save_strategy="steps", save_steps=1), make_items()).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    saved = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(tensor.numel() for tensor in saved.values()) == sum(parameter.numel() for parameter in trained)
    assert not (checkpoint / "model.safetensors").exists()


def test_a_map_that_the_language_model_lacks_is_an_error(make_model):
    with pytest.raises(ValueError, match=r"names query; the language model's linear maps are down_proj, gate_proj, "):
        add_adapter(make_model(), LoraSection(rank=4, target_modules=["query", "q_proj"]))


# Recipes


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Finished folders of one recipe, with the adapters merged and alone."""
    root = tmp_path_factory.mktemp("runs")
    changes = [*TINY, f"model.path={base}", "lora.rank=4", "lora.alpha=32", "training.learning_rate=1e-2"]
    return {
        name: run_recipe("stage3_gen", [*changes, f"lora.merge={merge}"], root / name, progress=False)
        for name, merge in (("merged", "true"), ("alone", "false"))
    }


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_the_finished_folder_is_a_plain_model_that_draws(runs, base):
    assert not any("lora" in name for name in weights(runs["merged"]))
    model = AutoModelForImageTextToText.from_pretrained(runs["merged"])
    processor = AutoProcessor.from_pretrained(runs["merged"])
    codes = model.generate(**processor.prepare_drawing(["a red circle"]), generation_mode="image")
    assert tuple(codes.shape) == (1, 4, 4)


def test_only_adapted_maps_and_full_parts_differ_from_the_start(runs, base):
    start = weights(base)
    moved = {name for name, value in weights(runs["merged"]).items() if not torch.equal(value, start.get(name, value))}
    assert {name for name in moved if "language_model" in name} == {
        name for name in start if name.split(".")[-2] in MAPS and "language_model" in name and "bias" not in name
    }
    assert {name for name in moved if "language_model" not in name} == {
        f"model.projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")
    }


def test_the_record_tells_that_an_adapter_trained(runs):
    parts = json.loads((runs["merged"] / "training.json").read_text())["parts"]
    assert [part for part, entry in parts.items() if entry["trained"]] == ["projector", "adapter", "visual_head"]


def test_an_adapter_alone_loads_over_its_base(runs, make_items):
    alone = ETTForConditionalGeneration.from_pretrained(runs["alone"])
    merged = ETTForConditionalGeneration.from_pretrained(runs["merged"])
    expected = logits(merged, make_items())
    torch.testing.assert_close(logits(alone, make_items()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", ["merged/adapter", "alone"])
def test_merged_afterwards_it_is_the_model_that_training_merges(runs, base, tmp_path, adapter):
    folder = runs["merged"].parent / adapter
    result = CliRunner().invoke(app, ["merge", str(base), str(folder), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(weights(tmp_path / "out"), weights(runs["merged"]), rtol=0, atol=1e-6)
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size["width"] == 16


ADAPTERS_OF_PEFT = {
    "a list of targets": LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    "rsLoRA": LoraConfig(r=4, lora_alpha=32, use_rslora=True, target_modules=["q_proj"]),
    "alpha_pattern": LoraConfig(r=4, lora_alpha=8, alpha_pattern={"v_proj": 64}, target_modules=["q_proj", "v_proj"]),
    "rank_pattern": LoraConfig(r=4, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"]),
    "DoRA": LoraConfig(r=4, lora_alpha=32, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "a pattern": LoraConfig(r=4, target_modules=r"model\.language_model\..*q_proj"),
    "whole modules": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["projector", "lm_head"]),
    "a task": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "biases": LoraConfig(r=4, bias="all", target_modules=["q_proj"], modules_to_save=["projector"]),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", ADAPTERS_OF_PEFT)
def test_adapters_of_peft_are_merged_as_peft_merges_them(base, tmp_path, name):
    start = ETTForConditionalGeneration.from_pretrained(base)
    shaken(get_peft_model(start, ADAPTERS_OF_PEFT[name])).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(ETTForConditionalGeneration.from_pretrained(base), tmp_path / "adapter")
    merge_folder(str(base), tmp_path / "adapter", tmp_path / "out")
    found = ETTForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    torch.testing.assert_close(found, model.merge_and_unload().state_dict(), rtol=0, atol=0)
    before = ETTForConditionalGeneration.from_pretrained(base)
    assert any("q_proj" in changed_name for changed_name in changed(found, before))


def test_an_adapter_that_adds_no_weights_is_not_merged(base, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=2)
    config.save_pretrained(tmp_path / "adapter")
    safetensors.torch.save_file(
        {"prompt_embeddings": torch.zeros(2, 32)}, tmp_path / "adapter/adapter_model.safetensors"
    )
    told = merge_error(base, tmp_path / "adapter", tmp_path / "out")
    assert "is of type PROMPT_TUNING, which adds no weights that can be merged" in told


def merge_error(*folders):
    result = CliRunner().invoke(app, ["merge", *map(str, folders)])
    assert result.exit_code == 1
    assert not folders[-1].exists()
    return result.output


def test_an_adapter_of_another_model_is_not_merged(runs, base, make_model, make_language_model, tmp_path):
    model = make_model(make_language_model(hidden_size=16))
    add_adapter(model, LoraSection(rank=4))
    train_only(model, ["language_model"])
    save_adapter(model, tmp_path / "other")
    told = merge_error(base, tmp_path / "other", tmp_path / "out")
    assert "The adapter does not fit this model in model.language_model.layers.0.mlp.down_proj.lora_B" in told


def test_a_folder_without_an_adapter_is_not_merged(runs, base, tmp_path):
    assert f"'{base}' holds no adapter" in merge_error(base, base, tmp_path / "out")


def test_nothing_is_merged_into_a_folder_that_holds_something(runs, base):
    result = CliRunner().invoke(app, ["merge", str(base), str(runs["alone"]), str(base)])
    assert result.exit_code == 1 and "holds something already; choose a new or empty folder" in result.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=0"], "lora.rank is 0; expected a whole number from 1 to 65536"),
        (["lora.rank=4", "lora.alpha=-1"], "lora.alpha is -1; expected a number above 0"),
        (["lora.rank=4", "lora.dropout=1"], "lora.dropout is 1; expected a share from 0 to below 1"),
        (["lora.alpha=8"], "lora section has no rank; give lora.rank"),
        (["lora.rank=4", "train=[projector]"], "language_model is not in train; add it"),
        (["lora.rank=4", "lora.merge=false", "model.path=null"], "start from a folder (model.path)"),
    ],
)
def test_a_lora_section_that_cannot_be_used_is_an_error_and_leaves_nothing(tmp_path, overrides, message):
    with pytest.raises(ValueError) as caught:
        run_recipe("stage3_chat", [*TINY, *overrides], tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
