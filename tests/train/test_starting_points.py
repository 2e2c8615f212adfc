"""What a tokenizer's training can start from, as whole runs: a converted checkpoint, its discriminator, a codebook of
another size; and which weights the finished folder holds."""

import json
import logging
import shutil

import pytest
import safetensors.torch
import torch

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.train import ETTTrainer, run, run_recipe
from ett.train.models.conversion import convert_tokenizer

from .ibq_reference import CODES, make_state, write_checkpoint

SCENES = [
    "data.source=scenes",
    "data.length=8",
    "model.image_size=16",
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "training.logging_steps=1",
    "training.save_steps=1",
    "training.use_cpu=true",
    "training.disable_tqdm=true",
    "training.report_to=none",
    "training.perceptual_weight=0",
    "training.discriminator_width=8",
    "training.discriminator_layers=2",
]
LANGUAGE_MODEL = (
    "model.language_model={model_type: qwen2, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, intermediate_size: 64}"
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint: its tokenizer's folder and its discriminator's file."""
    root = tmp_path_factory.mktemp("converted")
    source = write_checkpoint(root / "tokenizer.ckpt", make_state(0), make_state(1))
    convert_tokenizer(source, root / "tokenizer", discriminator=root / "discriminator.safetensors")
    return root / "tokenizer", root / "discriminator.safetensors"


@pytest.fixture
def at_start(monkeypatch):
    """Trains nothing, and returns the trainer of each run as it would have started."""
    trainers = []
    monkeypatch.setattr(ETTTrainer, "train", lambda self, **kwargs: trainers.append(self))
    return trainers


@pytest.fixture
def uncounted(monkeypatch):
    """Makes the counting of codes an error."""
    return lambda: monkeypatch.setattr(run, "count_codes", lambda *args: pytest.fail("codes were counted"))


def weights(folder):
    return safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_equal(ours, theirs):
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


# A converted checkpoint


def test_training_goes_on_from_a_converted_checkpoint(converted, at_start, tmp_path):
    folder, discriminator = converted
    run_recipe(
        "tokenizer", [*SCENES, f"model.path={folder}", f"model.discriminator={discriminator}"], tmp_path / "out"
    )
    assert_equal(at_start[0].model.state_dict(), weights(folder))
    at_start[0].average.start(at_start[0].model)
    assert_equal(at_start[0].average.weights, weights(folder))
    assert_equal(at_start[0].adversary.discriminator.state_dict(), safetensors.torch.load_file(discriminator))


def test_a_discriminator_of_another_size_is_an_error_that_says_what_to_set(converted, tmp_path):
    changes = [f"model.discriminator={converted[1]}", "training.discriminator_width=16"]
    with pytest.raises(ValueError) as caught:
        run_recipe("tokenizer", [*SCENES, f"model.path={converted[0]}", *changes], tmp_path / "out")
    assert "does not fit a discriminator of width 16 with 2 layers in main.0.bias, main.0.weight" in str(caught.value)
    assert "set training.discriminator_width=8 and training.discriminator_layers=2" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.discriminator={discriminator}", "training.adversarial_weight=0"], "this stage trains none"),
        (["model.discriminator=absent.safetensors"], "cannot be read as a safetensors file"),
        (["model.discriminator={folder}/diffusion_pytorch_model.safetensors"], "it is no discriminator of ETT"),
        (["model.linear_start=true"], "would overwrite the weights of '{folder}'; set model.linear_start=false"),
        (["model.codebook_size=0"], "model.codebook_size is 0; expected a whole number above 0"),
        (["model.codebook_size=8", "model.codebook_images=0"], "model.codebook_images is 0; expected a whole"),
    ],
)
def test_a_start_that_cannot_be_is_an_error_and_leaves_nothing(converted, tmp_path, changes, message):
    names = {"folder": converted[0], "discriminator": converted[1]}
    overrides = [*SCENES, f"model.path={converted[0]}", *(change.format(**names) for change in changes)]
    with pytest.raises(ValueError) as caught:
        run_recipe("tokenizer", overrides, tmp_path / "out")
    assert message.format(**names) in str(caught.value)
    assert not (tmp_path / "out").exists()


# The discriminator of a folder


@pytest.fixture
def with_discriminator(converted, tmp_path):
    """A tokenizer's folder with a discriminator in it, as its stage would leave it."""
    folder = shutil.copytree(converted[0], tmp_path / "with-discriminator")
    shutil.copyfile(converted[1], folder / "discriminator.safetensors")
    return folder


def test_training_continues_the_discriminator_of_the_folder(with_discriminator, at_start, tmp_path):
    run_recipe("tokenizer", [*SCENES, f"model.path={with_discriminator}"], tmp_path / "out")
    expected = safetensors.torch.load_file(with_discriminator / "discriminator.safetensors")
    assert_equal(at_start[0].adversary.discriminator.state_dict(), expected)


def test_a_new_discriminator_starts_where_the_recipe_says_new(with_discriminator, at_start, tmp_path):
    overrides = [*SCENES, f"model.path={with_discriminator}", "model.discriminator=new"]
    run_recipe("tokenizer", overrides, tmp_path / "out")
    folders = safetensors.torch.load_file(with_discriminator / "discriminator.safetensors")
    assert not torch.equal(at_start[0].adversary.discriminator.main[0].weight, folders["main.0.weight"])


def test_a_file_takes_the_place_of_the_folders_discriminator(with_discriminator, at_start, tmp_path):
    tensors = safetensors.torch.load_file(with_discriminator / "discriminator.safetensors")
    tensors["lecam_real"] = torch.tensor(2.0)
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors")
    overrides = [*SCENES, f"model.path={with_discriminator}", f"model.discriminator={tmp_path / 'other.safetensors'}"]
    run_recipe("tokenizer", overrides, tmp_path / "out")
    assert at_start[0].adversary.discriminator.lecam_real == 2


def test_a_folders_discriminator_of_another_size_is_an_error_that_says_what_to_set(with_discriminator, tmp_path):
    overrides = [*SCENES, f"model.path={with_discriminator}", "training.discriminator_layers=1"]
    with pytest.raises(ValueError) as caught:
        run_recipe("tokenizer", overrides, tmp_path / "out")
    assert "set training.discriminator_width=8 and training.discriminator_layers=2" in str(caught.value)
    assert "or start a new one with model.discriminator=new" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_discriminator_is_not_passed_on(with_discriminator, tmp_path):
    shutil.copyfile(
        with_discriminator / "diffusion_pytorch_model.safetensors", with_discriminator / "discriminator.safetensors"
    )
    overrides = [*SCENES, f"model.vision_tokenizer={with_discriminator}", LANGUAGE_MODEL]
    with pytest.raises(ValueError, match=r"discriminator\.safetensors' has no tensor main\.0\.weight"):
        run_recipe("demo_language", overrides, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WARNING = "A new discriminator starts beside the trained tokenizer of '{}': let it learn first"


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ([], True),
        (["training.discriminator_warmup_steps=1"], False),
        (["training.adversarial_weight=0"], False),
    ],
    ids=["at once", "after a warm-up", "none at all"],
)
def test_a_new_discriminator_beside_a_trained_tokenizer_is_a_warning(
    converted, at_start, tmp_path, caplog, changes, warned
):
    with caplog.at_level(logging.WARNING, logger="ett.train.run"):
        run_recipe("tokenizer", [*SCENES, f"model.path={converted[0]}", *changes], tmp_path / "out")
    assert (WARNING.format(converted[0]) in caplog.text) == warned


def test_a_discriminator_that_continues_is_no_warning(with_discriminator, at_start, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="ett.train.run"):
        run_recipe("tokenizer", [*SCENES, f"model.path={with_discriminator}"], tmp_path / "out")
    assert "discriminator" not in caplog.text


# A codebook of another size


@pytest.mark.parametrize("size", [CODES // 2, 2 * CODES])
def test_a_run_starts_with_a_codebook_of_the_recipes_size(converted, tmp_path, size):
    overrides = [*SCENES, f"model.path={converted[0]}", f"model.codebook_size={size}"]
    out = run_recipe("tokenizer", overrides, tmp_path / "out", progress=False)
    assert IBQModel.from_pretrained(out).config.num_vq_embeddings == size
    assert weights(out)["quantize.embedding.weight"].shape[0] == size


def test_a_codebook_of_that_size_already_is_not_counted(converted, at_start, uncounted, tmp_path):
    uncounted()
    run_recipe("tokenizer", [*SCENES, f"model.path={converted[0]}", f"model.codebook_size={CODES}"], tmp_path / "out")
    assert_equal(at_start[0].model.state_dict(), weights(converted[0]))


def test_on_resuming_nothing_is_counted_again_and_the_end_is_the_same(converted, uncounted, tmp_path, monkeypatch):
    overrides = [*SCENES, f"model.path={converted[0]}", "model.codebook_size=20"]
    whole = run_recipe("tokenizer", overrides, tmp_path / "whole", progress=False)

    step = ETTTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ETTTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe("tokenizer", overrides, tmp_path / "resumed", progress=False)
    uncounted()
    resumed = run_recipe("tokenizer", overrides, tmp_path / "resumed", progress=False)
    assert_equal(weights(resumed), weights(whole))


def test_a_new_tokenizers_codebook_has_its_size_elsewhere(tmp_path):
    small = "model.vision_tokenizer={block_out_channels: [32, 32, 32, 32, 32], num_vq_embeddings: 8, vq_embed_dim: 8}"
    with pytest.raises(ValueError, match=r"a new one has its size in model\.vision_tokenizer\.num_vq_embeddings"):
        run_recipe("tokenizer", [*SCENES, small, "model.codebook_size=4"], tmp_path / "out")


def test_only_the_tokenizers_own_stage_changes_the_codebook(converted, tmp_path):
    overrides = [*SCENES, f"model.vision_tokenizer={converted[0]}", LANGUAGE_MODEL, "model.codebook_size=8"]
    with pytest.raises(ValueError, match=r"model\.codebook_size is for the tokenizer's own stage"):
        run_recipe("demo_language", overrides, tmp_path / "out")


# The finished folder


@pytest.mark.parametrize(("decay", "kind", "held"), [("0.5", "ema", "average"), ("null", "raw", None)])
def test_a_finished_folder_holds_the_average_where_there_is_one(converted, tmp_path, decay, kind, held):
    out = run_recipe(
        "tokenizer", [*SCENES, f"model.path={converted[0]}", f"training.ema_decay={decay}"], tmp_path / "out"
    )
    checkpoint = out / "training" / "checkpoint-2"
    name = f"{held}.safetensors" if held else "diffusion_pytorch_model.safetensors"
    assert_equal(weights(out), safetensors.torch.load_file(checkpoint / name))
    assert (checkpoint / "average.safetensors").exists() == (kind == "ema")
    assert json.loads((out / "training.json").read_text())["weights"] == kind


def test_recipes_report_to_tensorboard_below_the_run(converted, tmp_path):
    overrides = [override for override in SCENES if "report_to" not in override]
    out = run_recipe("tokenizer", [*overrides, f"model.path={converted[0]}"], tmp_path / "out", progress=False)
    assert list((out / "training" / "tensorboard").glob("events.out.tfevents.*"))
    assert [path.name for path in (out / "training" / "samples").iterdir()] == ["reconstructions-000002.png"]
