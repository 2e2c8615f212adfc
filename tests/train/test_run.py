"""The whole road at its smallest: every stage from the folder of the one before, and what a folder may hold."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import ett  # noqa: F401 - makes the Auto classes know ETT
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor
from ett.train import ETTTrainer, run_recipe
from ett.train.checkpointing.checkpoints import CheckpointError

TINY = [
    "data.source=scenes",
    "data.length=8",
    "data.in_memory=true",
    "model.image_size=16",
    "training.max_steps=2",
    "training.global_batch_size=2",
    "training.per_device_train_batch_size=2",
    "training.logging_steps=1",
    "training.save_steps=2",
    "training.use_cpu=true",
    "training.bf16=false",
    "training.disable_tqdm=true",
    "training.report_to=none",
    "training.perceptual_weight=0",
    "training.discriminator_width=8",
    "training.discriminator_layers=1",
    "training.discriminator_start_step=0",
]
VISION_TOKENIZER = (
    "model.vision_tokenizer={down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D], "
    "up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D], block_out_channels: [16, 16], layers_per_block: 1, "
    "latent_channels: 8, num_vq_embeddings: 32, vq_embed_dim: 8, norm_num_groups: 4, patch_size: 2}"
)
LANGUAGE_MODEL = (
    "model.language_model={model_type: qwen2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, intermediate_size: 64, tie_word_embeddings: true}"
)
TOKENIZER = [*TINY, VISION_TOKENIZER]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The folders of all stages, by name, each trained from an earlier one's."""
    root = tmp_path_factory.mktemp("stages")
    return {
        "tokenizer": run_recipe("demo_tokenizer", TOKENIZER, root / "tokenizer"),
        "language": run_recipe(
            "demo_language", [*TINY, f"model.vision_tokenizer={root / 'tokenizer'}", LANGUAGE_MODEL], root / "language"
        ),
        "semantic": run_recipe("stage2_semantic", [*TINY, f"model.path={root / 'language'}"], root / "semantic"),
        "chat": run_recipe("stage3_chat", [*TINY, f"model.path={root / 'semantic'}"], root / "chat"),
        "gen": run_recipe("stage3_gen", [*TINY, f"model.path={root / 'semantic'}"], root / "gen"),
    }


def record(folder):
    return json.loads((folder / "training.json").read_text())


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_every_stage_leaves_a_folder_that_loads(stages):
    tokenizer = IBQModel.from_pretrained(stages["tokenizer"])
    assert tokenizer.spatial_factor == 4
    assert ETTImageProcessor.from_pretrained(stages["tokenizer"]).size["height"] == 16
    for name in ("language", "semantic", "chat", "gen"):
        model = AutoModelForImageTextToText.from_pretrained(stages[name])
        assert type(model).__name__ == "ETTForConditionalGeneration"
        assert type(AutoModel.from_pretrained(stages[name])).__name__ == "ETTModel"
        processor = AutoProcessor.from_pretrained(stages[name])
        assert processor.spatial_factor == 4 and processor.image_processor.size["width"] == 16
        assert model.config.image_token_id == processor.image_token_id
        assert model.config.answers == (name != "gen")
        assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
        assert (stages[name] / "model_index.json").is_file() == (name == "gen")


def test_each_stage_moves_its_own_parts_of_the_one_before(stages):
    tokenizer = IBQModel.from_pretrained(stages["tokenizer"]).state_dict()
    loaded = {name: weights(stages[name]) for name in ("language", "semantic", "chat", "gen")}

    def moved(before, after):
        parts = ("vision_tokenizer", "projector", "language_model")
        return {
            part
            for part in parts
            for name, value in before.items()
            if part in name and not torch.equal(value, after[name])
        }

    for name, value in tokenizer.items():
        assert torch.equal(loaded["language"][f"model.vision_tokenizer.{name}"], value)
    assert moved(loaded["language"], loaded["semantic"]) == {"vision_tokenizer", "projector", "language_model"}
    assert moved(loaded["semantic"], loaded["chat"]) == {"projector", "language_model"}
    assert moved(loaded["semantic"], loaded["gen"]) == {"projector", "language_model"}
    assert "visual_head.weight" in loaded["gen"] and "visual_head.weight" not in loaded["chat"]


def test_the_chat_model_answers_and_the_drawing_model_draws(stages):
    model = AutoModelForImageTextToText.from_pretrained(stages["chat"])
    processor = AutoProcessor.from_pretrained(stages["chat"])
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]}
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=torch.rand(3, 20, 30), text=text)
    written = model.generate(**inputs, max_new_tokens=3, min_new_tokens=1)[:, inputs["input_ids"].shape[1] :]
    assert 1 <= written.shape[1] <= 3

    model = AutoModelForImageTextToText.from_pretrained(stages["gen"])
    processor = AutoProcessor.from_pretrained(stages["gen"])
    codes = model.generate(**processor.prepare_drawing(["a red circle", "a circle"]), generation_mode="image")
    images = processor.post_process_images(model.decode_image_tokens(codes))
    assert [image.size for image in images] == [(16, 16)] * 2


def test_the_index_baseline_goes_the_same_road(stages, tmp_path):
    parts = [f"model.vision_tokenizer={stages['tokenizer']}", LANGUAGE_MODEL]
    alignment = run_recipe("ablation_index_alignment", [*TINY, *parts], tmp_path / "alignment")
    assert {part for part, entry in record(alignment)["parts"].items() if entry["trained"]} == {"index_embedding"}
    gen = run_recipe("ablation_index_gen", [*TINY, f"model.path={alignment}"], tmp_path / "gen")
    model, processor = AutoModelForImageTextToText.from_pretrained(gen), AutoProcessor.from_pretrained(gen)
    assert model.config.visual_embedding == "index" and not hasattr(model.model, "projector")
    codes = model.generate(**processor.prepare_drawing(["a red circle"]), generation_mode="image")
    assert tuple(codes.shape) == (1, 4, 4)


def test_the_record_tells_how_a_folder_was_made(stages):
    told = record(stages["semantic"])
    assert told["kind"] == "chat" and record(stages["gen"])["kind"] == "gen"
    assert record(stages["tokenizer"])["kind"] == "tokenizer"
    assert told["recipe"]["task"] == "caption"
    assert told["recipe"]["training"]["alpha"] == 0.25
    assert told["steps"] == 2 and told["seconds"] > 0
    assert told["data"].startswith("8 scenes of the embedded dataset")
    assert {part for part, entry in told["parts"].items() if entry["trained"]} == {
        "vision_tokenizer",
        "projector",
        "language_model",
    }
    logged = [entry for entry in told["history"] if "caption_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert {"reconstruction_loss", "adversarial_loss", "psnr", "codebook_usage"} <= set(logged[0])
    assert set(told["versions"]) >= {"python", "torch", "transformers", "diffusers"}


def test_the_record_has_the_models_values_where_the_recipe_says_nothing(stages, tmp_path):
    changes = [change for change in TINY if not change.startswith("model.image_size")]
    folder = run_recipe("demo_alignment", [*changes, f"model.path={stages['language']}"], tmp_path / "alignment")
    model = record(folder)["recipe"]["model"]
    assert (model["image_size"], model["code_positions"], model["visual_head"]) == (16, True, False)
    assert record(stages["gen"])["recipe"]["model"]["visual_head"] is True


def test_the_folder_and_the_record_say_how_images_were_fitted(stages, tmp_path):
    fits = {"tokenizer": "crop", "semantic": "pad", "chat": "pad", "gen": "crop"}
    for name, fit in fits.items():
        processor = AutoProcessor.from_pretrained(stages[name]) if name != "tokenizer" else None
        image_processor = processor.image_processor if processor else ETTImageProcessor.from_pretrained(stages[name])
        assert image_processor.fit == fit
        assert record(stages[name])["recipe"]["data"]["fit"] == fit


# The discriminator


def discriminator_of(folder):
    return (folder / "discriminator.safetensors").read_bytes()


def test_a_stage_that_trains_a_discriminator_leaves_it_beside_the_model(stages):
    for name in ("tokenizer", "semantic"):
        checkpoint = stages[name] / "training" / "checkpoint-2"
        assert discriminator_of(stages[name]) == discriminator_of(checkpoint)
        assert record(stages[name])["discriminator"] == {"width": 8, "layers": 1}
    assert load_file(stages["tokenizer"] / "discriminator.safetensors")["lecam_real"] != 0


def test_the_stages_between_pass_the_discriminator_on(stages, tmp_path):
    alignment = run_recipe("demo_alignment", [*TINY, f"model.path={stages['language']}"], tmp_path / "alignment")
    for folder in (stages["language"], alignment):
        assert discriminator_of(folder) == discriminator_of(stages["tokenizer"])
        assert record(folder)["discriminator"] == {"width": 8, "layers": 1}


def test_a_stage_3_folder_has_no_discriminator(stages):
    for name in ("chat", "gen"):
        assert not (stages[name] / "discriminator.safetensors").exists()
        assert record(stages[name])["discriminator"] is None


def test_stage_2_continues_the_discriminator_of_the_tokenizers_stage(stages, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(ETTTrainer, "train", lambda self, **kwargs: trainers.append(self))
    run_recipe("stage2_semantic", [*TINY, f"model.path={stages['language']}"], tmp_path / "semantic")
    expected = load_file(stages["tokenizer"] / "discriminator.safetensors")
    torch.testing.assert_close(dict(trainers[0].adversary.discriminator.state_dict()), expected, rtol=0, atol=0)


def test_a_new_discriminator_that_never_learned_is_not_kept(tmp_path):
    out = run_recipe("demo_tokenizer", [*TOKENIZER, "training.discriminator_start_step=2"], tmp_path / "tokenizer")
    assert not (out / "discriminator.safetensors").exists()
    assert record(out)["discriminator"] is None


def test_a_finished_folder_is_left_as_it_is(stages, monkeypatch, caplog):
    monkeypatch.setattr(ETTTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in stages["tokenizer"].rglob("*")}
    with caplog.at_level(logging.WARNING, logger="ett.train.run"):
        assert run_recipe("demo_tokenizer", TOKENIZER, stages["tokenizer"]) == stages["tokenizer"]
    assert "holds a finished model of this recipe already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in stages["tokenizer"].rglob("*")} == before


def test_a_finished_folder_is_not_trained_over(stages):
    with pytest.raises(ValueError, match="holds a finished model; choose another --output-dir"):
        run_recipe("demo_tokenizer", TOKENIZER, stages["tokenizer"], resume=False)


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    overrides = [*TOKENIZER, "training.max_steps=4"]
    whole = run_recipe("demo_tokenizer", overrides, tmp_path / "whole")

    step = ETTTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ETTTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe("demo_tokenizer", overrides, tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "training.json").exists()
    assert (tmp_path / "resumed" / "training" / "checkpoint-2").is_dir()

    steps = []
    monkeypatch.setattr(
        ETTTrainer, "training_step", lambda self, *a, **k: steps.append(self.state.global_step) or step(self, *a, **k)
    )
    resumed = run_recipe("demo_tokenizer", overrides, tmp_path / "resumed")
    assert steps == [2, 3]
    expected = IBQModel.from_pretrained(whole).state_dict()
    for name, value in IBQModel.from_pretrained(resumed).state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert [entry.get("vq_loss") for entry in record(resumed)["history"]] == [
        entry.get("vq_loss") for entry in record(whole)["history"]
    ]


def test_a_disk_that_is_full_at_the_end_leaves_the_last_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    save = IBQModel.save_pretrained

    def save_until_full(self, folder, **kwargs):
        if Path(folder).name == "final":
            raise SafetensorError("No space left on device")
        save(self, folder, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(IBQModel, "save_pretrained", save_until_full)
        with pytest.raises(CheckpointError, match=r"final could not be written.*checkpoint-2 is whole; make room"):
            run_recipe("demo_tokenizer", TOKENIZER, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "training" / "final").exists()
    run_recipe("demo_tokenizer", TOKENIZER, tmp_path / "run", progress=False)
    assert IBQModel.from_pretrained(tmp_path / "run")


def test_the_same_recipe_and_seed_give_the_same_model(stages, tmp_path):
    again = run_recipe("demo_tokenizer", TOKENIZER, tmp_path / "again")
    other = run_recipe("demo_tokenizer", [*TOKENIZER, "training.seed=1"], tmp_path / "other")
    first = IBQModel.from_pretrained(stages["tokenizer"]).state_dict()
    assert all(torch.equal(value, first[name]) for name, value in IBQModel.from_pretrained(again).state_dict().items())
    seeded = IBQModel.from_pretrained(other).state_dict()
    assert not torch.equal(seeded["encoder.conv_in.weight"], first["encoder.conv_in.weight"])


def test_callbacks_see_every_step(tmp_path):
    steps = []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append((state.global_step, state.max_steps))

    run_recipe("demo_tokenizer", TOKENIZER, tmp_path / "run", progress=False, callbacks=[Steps()])
    assert steps == [(1, 2), (2, 2)]


# What cannot be used


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("stage2_semantic", [*TINY, "data.source=null"], "This recipe needs data: give data.source=FOLDER"),
        ("stage2_semantic", [*TINY, "task=cation"], "task is 'cation'; expected one of reconstruction"),
        ("stage2_semantic", [*TINY, "model.path=./absent"], "There is no model folder './absent'"),
        ("stage2_semantic", [*TINY, "model.path=null"], "This recipe needs a model: give model.path"),
        ("demo_tokenizer", [*TINY, "model.vision_tokenizer={chanels: 3}"], "model.vision_tokenizer cannot be used"),
        ("demo_tokenizer", [*TOKENIZER, "training.perceptual_network=vgg19"], "expected one of vgg, alex, squeeze"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, name, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        run_recipe(name, overrides, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fewer_samples_than_a_batch_are_an_error_where_the_last_batch_is_dropped(tmp_path):
    batch = ["training.per_device_train_batch_size=16", "training.global_batch_size=16"]
    message = r"have 8 samples, and a batch has 16 \(16 on each device\): .*no batch is left"
    with pytest.raises(ValueError, match=message):
        run_recipe("demo_tokenizer", [*TOKENIZER, *batch, "training.dataloader_drop_last=true"], tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_folder_of_another_kind_is_an_error(stages, tmp_path):
    with pytest.raises(ValueError, match="holds a model of kind 'IBQModel'; expected 'ett'"):
        run_recipe("stage3_chat", [*TINY, f"model.path={stages['tokenizer']}"], tmp_path / "out")
    with pytest.raises(ValueError, match="holds a model of kind 'ett'; expected 'IBQModel'"):
        run_recipe("demo_tokenizer", [*TINY, f"model.vision_tokenizer={stages['chat']}"], tmp_path / "out")


def test_images_of_ones_own_train_and_skipped_ones_are_recorded(stages, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (30 + index, 20), (60 * index, 0, 0)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    names = ["0.png", "1.png", "broken.png", "2.png", "3.png"]
    lines = [json.dumps({"file_name": name, "text": "a red circle"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    overrides = [*TINY, f"data.source={folder}", f"model.path={stages['language']}"]
    out = run_recipe("stage2_semantic", overrides, tmp_path / "out")
    assert [name.rsplit("/")[-1] for name in record(out)["skipped_images"]] == ["broken.png"]
    assert record(out)["data"] == str(folder)
    assert AutoModelForImageTextToText.from_pretrained(out).config.image_size == 16
