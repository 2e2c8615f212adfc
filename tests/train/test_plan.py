"""A run's plan (`--dry-run`): what it would do and need, without a weight or a file."""

import json

import pytest
import safetensors.torch
import torch
import yaml
from typer.testing import CliRunner

import ett.cli
from ett.train import load_recipe, train_only
from ett.train.models.building import build_model
from ett.train.objective.discriminator import PatchDiscriminator
from ett.train.planning.footprint import peak_bytes
from ett.train.planning.plan import MOST_COUNTED, count_examples, model_without_weights, plan_recipe

TOKENIZER = (
    "model.vision_tokenizer={down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D], "
    "up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D], block_out_channels: [16, 16], layers_per_block: 1, "
    "latent_channels: 8, num_vq_embeddings: 32, vq_embed_dim: 8, norm_num_groups: 4, patch_size: 2}"
)
LANGUAGE_MODEL = (
    "model.language_model={model_type: qwen2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, intermediate_size: 64, tie_word_embeddings: true}"
)
SMALL = [
    "model.image_size=16",
    "training.use_cpu=true",
    "training.bf16=false",
    "training.discriminator_width=8",
    "training.discriminator_layers=1",
    "training.perceptual_weight=0",
]
NEW = ["data.source=scenes", "data.length=100", TOKENIZER, LANGUAGE_MODEL, *SMALL]


@pytest.fixture
def model_folder(make_model, tmp_path):
    """A former stage's folder, without its weights."""
    make_model().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.perceptual_weight=1", "perceptual_network is 'squeeze', which takes images of at least 17 x 17"),
        ("training.discriminator_layers=3", "discriminator_layers is 3, which takes images of at least 24 x 24"),
    ],
)
def test_images_too_small_for_the_tokenizers_losses_are_an_error(setting, message):
    changes = [change for change in SMALL if not change.startswith(setting.partition("=")[0])]
    with pytest.raises(ValueError, match=message):
        plan_recipe("demo_tokenizer", ["data.source=scenes", TOKENIZER, *changes, setting])


def test_a_discriminator_of_any_width_is_planned_without_its_weights():
    recipe = ["data.source=scenes", TOKENIZER, *SMALL, f"training.discriminator_width={2**16}"]
    assert plan_recipe("demo_tokenizer", recipe).memory["weights"] > 2**38


# Parameters


def test_parameters_are_those_of_the_new_model_that_training_would_build():
    recipe = load_recipe("demo_language", NEW)

    class Vocabulary:
        @staticmethod
        def texts():
            return ["a red circle"]

        @staticmethod
        def spelled():
            return []

    real, _ = build_model(recipe, Vocabulary)
    parts = plan_recipe("demo_language", NEW).parts
    expected = train_only(real, recipe.train)
    assert parts["vision_tokenizer"] == expected["vision_tokenizer"] == (expected["vision_tokenizer"][0], False)
    assert parts["projector"] == expected["projector"]
    # Words of the scenes in the place of three.
    words = model_without_weights(recipe).config.text_config.vocab_size - real.config.text_config.vocab_size
    assert parts["language_model"] == (expected["language_model"][0] + 32 * words, True)


@pytest.mark.parametrize("stage", ["stage2_semantic", "stage3_gen"])
def test_parameters_are_those_of_a_former_stages_folder(make_model, model_folder, stage):
    plan = plan_recipe(stage, [f"model.path={model_folder}", *SMALL])
    assert plan.parts == train_only(make_model(), plan.recipe.train)


def test_an_index_model_is_planned_with_its_embedding_in_the_projectors_place():
    index = ["model.visual_embedding=index", "train=[index_embedding]"]
    plan = plan_recipe("demo_alignment", ["model.path=null", *NEW, *index])
    assert plan.parts["index_embedding"] == (32 * 32, True) and "projector" not in plan.parts
    assert "activations: index_embedding" in plan.memory


def test_no_weight_is_made(model_folder):
    model = model_without_weights(load_recipe("stage3_chat", [f"model.path={model_folder}"]))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_name_on_the_hub_that_is_out_of_reach_is_an_error():
    with pytest.raises(ValueError, match=r"The configuration of 'someone/absent' is no folder here, not in the cache"):
        plan_recipe("stage1_alignment", ["model.language_model=someone/absent", TOKENIZER])


# The discriminator


def discriminator_lines(stage, overrides):
    report = plan_recipe(stage, overrides).report()
    _, separator, rest = report.partition("# Discriminator\n")
    return [line.removeprefix("#   ") for line in rest.split("\n#\n")[0].splitlines()] if separator else None


def test_the_plan_names_the_discriminator_that_a_run_continues(model_folder):
    path = f"{model_folder}/discriminator.safetensors"
    safetensors.torch.save_model(PatchDiscriminator(width=8, num_layers=1), path)
    assert discriminator_lines("stage2_semantic", [f"model.path={model_folder}", *SMALL]) == [
        f"continues '{path}' (width 8, 1 layers)",
        "learns from step 0; its loss counts from step 0",
    ]
    with pytest.raises(ValueError, match=r"for this file set training\.discriminator_width=8"):
        plan_recipe("stage2_semantic", [f"model.path={model_folder}", *SMALL, "training.discriminator_width=16"])


def test_the_plan_warns_of_a_new_discriminator_beside_a_trained_tokenizer(model_folder):
    assert discriminator_lines("stage2_semantic", [f"model.path={model_folder}", *SMALL]) == [
        "a new discriminator (width 8, 1 layers)",
        "learns from step 0; its loss counts from step 0",
        f"A new discriminator starts beside the trained tokenizer of '{model_folder}': let it learn first "
        "(training.discriminator_warmup_steps), or continue a trained one (model.discriminator=FILE).",
    ]


def test_the_plan_tells_when_a_discriminator_learns_and_counts(model_folder):
    steps = ["training.discriminator_start_step=100", "training.discriminator_warmup_steps=1000"]
    assert discriminator_lines("stage2_semantic", [f"model.path={model_folder}", *SMALL, *steps]) == [
        "a new discriminator (width 8, 1 layers)",
        "learns from step 100; its loss counts from step 1,100",
    ]


def test_the_plan_of_a_new_tokenizer_has_no_warning():
    lines = discriminator_lines("tokenizer", ["data.source=scenes", TOKENIZER, *SMALL])
    assert lines[0] == "a new discriminator (width 8, 1 layers)" and len(lines) == 2


def test_the_plan_of_a_stage_without_a_discriminator_names_none(model_folder):
    assert discriminator_lines("stage3_chat", [f"model.path={model_folder}", *SMALL]) is None


# Steps


def test_a_step_has_the_global_batch_on_any_number_of_devices(model_folder):
    plans = [plan_recipe("stage3_chat", [f"model.path={model_folder}", *SMALL], devices) for devices in (1, 8)]
    assert [plan.step_examples for plan in plans] == [1024, 1024]
    assert [plan.accumulation for plan in plans] == [256, 32]
    assert plans[0].step_flops == plans[1].step_flops


def test_steps_and_epochs_follow_from_the_examples():
    batch = ["training.max_steps=-1", "training.num_train_epochs=2", "training.gradient_accumulation_steps=3"]
    plan = plan_recipe("demo_language", [*NEW, *batch, "training.per_device_train_batch_size=8"])
    # 100 examples are 13 batches, which are 5 steps.
    assert (plan.examples, plan.steps) == (100, 10)


def test_fewer_samples_than_a_batch_are_the_error_of_the_run_where_the_last_batch_is_dropped():
    overrides = [*NEW, "training.per_device_train_batch_size=16", "training.dataloader_drop_last=true"]
    assert plan_recipe("demo_language", overrides, devices=6).examples == 100
    with pytest.raises(ValueError, match=r"have 100 samples, and a batch has 112 \(16 on each device\): .*no batch"):
        plan_recipe("demo_language", overrides, devices=7)


def test_streamed_samples_are_not_too_few(model_folder):
    streamed = ["data.source=scenes", "data.length=2", "data.streaming=true", "training.max_steps=3"]
    overrides = [f"model.path={model_folder}", *SMALL, *streamed, "training.dataloader_drop_last=true"]
    assert plan_recipe("stage3_chat", overrides, devices=1).steps == 3


def test_steps_leave_out_the_last_batch_where_it_is_dropped():
    batch = ["training.max_steps=-1", "training.num_train_epochs=2", "training.gradient_accumulation_steps=3"]
    overrides = [*NEW, *batch, "training.per_device_train_batch_size=8", "training.dataloader_drop_last=true"]
    # Of 100 examples 12 batches are whole, which are 4 steps.
    assert plan_recipe("demo_language", overrides).steps == 8


def test_tokens_are_the_images_and_those_the_text_is_taken_to_have(model_folder):
    plan = plan_recipe("stage3_chat", [f"model.path={model_folder}", *SMALL], text_tokens=20)
    assert plan.positions == 16 + 2 + 20


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], "not given (data.source)"),
        (["data.source=scenes", "data.length=7"], 7),
        (["data.source=someone/data"], "not counted (not on this machine)"),
        (["data.mixture={a: {source: scenes, length: 3}, b: {source: scenes, length: 4}}"], 7),
        (["data.mixture={a: {source: scenes}, b: {source: someone/data}}"], "b: not counted (not on this machine)"),
    ],
)
def test_what_is_known_of_the_data_is_counted_and_the_rest_is_said(overrides, count):
    assert count_examples(load_recipe("stage1_alignment", overrides).data) == count


def test_rows_of_local_data_are_counted(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(5)))
    assert count_examples(load_recipe("stage3_chat", [f"data.source={tmp_path / 'data.jsonl'}"]).data) == 5
    assert MOST_COUNTED > 5


# Memory


def test_weights_gradients_and_optimizer_are_counted_in_bytes(model_folder):
    overrides = [f"model.path={model_folder}", *SMALL, "training.ema_decay=0.9"]
    plan = plan_recipe("stage2_semantic", overrides, devices=8)
    total = sum(count for count, _ in plan.parts.values())
    trained = sum(count for count, is_trained in plan.parts.values() if is_trained)
    adversary = plan.memory["weights"] // 4 - total
    assert adversary > 0
    assert plan.memory["gradients"] == 4 * (trained + adversary)
    assert plan.memory["optimizer"] == 8 * (trained + adversary)
    assert plan.memory["DDP's buckets"] == 4 * trained
    assert plan.memory["average"] == 4 * total
    assert plan.checkpoint == 8 * total + 8 * trained + 12 * adversary
    sharded = plan.bytes_of_device(("weights", "optimizer"))
    assert plan.bytes_of_device() - sharded == sum(
        plan.memory[kind] - plan.memory[kind] // 8 for kind in ("weights", "optimizer")
    )


def test_activations_are_what_the_way_back_needs():
    """Two linear layers with a ReLU: its output and the next gradients, of 4 bytes each."""
    with torch.device("meta"):
        layers = torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 4))
    forward = peak_bytes(lambda module, x: module(x), layers, (10, 4), back=False)
    assert forward == 2 * 4 * 10 * 1000
    assert 3 * 4 * 10 * 1000 < peak_bytes(lambda module, x: module(x), layers, (10, 4)) < 5 * 4 * 10 * 1000


def test_less_is_held_with_gradient_checkpointing(model_folder):
    overrides = [f"model.path={model_folder}", *SMALL]
    plans = [
        plan_recipe("stage2_semantic", [*overrides, f"training.gradient_checkpointing={on}"]) for on in (False, True)
    ]
    for part in ("vision_tokenizer", "language_model"):
        held = [plan.memory[f"activations: {part}"] for plan in plans]
        assert held[1] < held[0]


# The command


def test_the_command_prints_the_resolved_recipe_and_writes_nothing(model_folder, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    arguments = ["train", "stage3_chat", f"model.path={model_folder}", *SMALL, "--dry-run", "--devices", "8"]
    result = CliRunner().invoke(ett.cli.app, [*arguments, "training.peak_flops=1e12"])
    assert result.exit_code == 0, result.output
    resolved = yaml.safe_load(result.stdout)
    assert resolved["training"]["global_batch_size"] == 1024 and resolved["data"]["max_length"] == 4096
    for line in ("examples a step", "not given (data.source)", "with FSDP2 or ZeRO-3", "a checkpoint", "40% of 1e+12"):
        assert line in result.stdout
    assert list(work.iterdir()) == []
