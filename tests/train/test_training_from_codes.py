"""Stages with a frozen tokenizer from codes that were made once: they learn what they would from pixels, and codes
that do not fit are refused before anything is loaded."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import ett  # noqa: F401 - makes the Auto classes know ETT
from ett import scenes_ett
from ett.cli import app
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.processing_ett import ETTImageProcessor, ETTProcessor, build_word_tokenizer
from ett.train import read_record, run_recipe
from ett.train.models.building import new_language_model

from .tokenized import NUM_IMAGES, image, tokenize

TINY = [
    "data.fit=crop",
    "model.image_size=16",
    "training.max_steps=3",
    "training.global_batch_size=2",
    "training.per_device_train_batch_size=2",
    "training.logging_steps=1",
    "training.save_strategy='no'",
    "training.use_cpu=true",
    "training.bf16=false",
    "training.disable_tqdm=true",
    "training.report_to=none",
]
LANGUAGE_FIELDS = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def tokenizer(make_vision_tokenizer):
    return make_vision_tokenizer().eval()


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ETTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def model_folder(tokenizer, tmp_path):
    """An ETT model with the tokenizer."""
    words = build_word_tokenizer(scenes_ett.vocabulary())
    processor = ETTProcessor.from_parts(words, tokenizer, image_size=16)
    torch.manual_seed(0)
    model = ETTForConditionalGeneration.from_parts(
        new_language_model(LANGUAGE_FIELDS, words),
        tokenizer,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_size=16,
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path):
    """A folder of images of several sizes with captions and conversations about them."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number in range(NUM_IMAGES):
        image(number).save(folder / f"{number}.png")
        text = "a red circle" if number % 2 else "a blue square and a red circle"
        question = [{"type": "image", "text": None}, {"type": "text", "text": "what color is the circle?"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text, "messages": messages}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def codes(images, tokenizer, tmp_path):
    tokenize(images, tmp_path / "codes", tokenizer)
    return tmp_path / "codes"


def run(recipe, source, start, output, *overrides):
    start = [f"model.{name}={value}" for name, value in start.items()]
    return run_recipe(recipe, [*TINY, *start, f"data.source={source}", *overrides], output, progress=False)


def assert_same_training(first, second):
    histories = [read_record(folder)["history"] for folder in (first, second)]
    assert len(histories[0]) == len(histories[1]) >= 3
    timed = ("runtime", "per_second", "flos")
    for before, after in zip(*histories, strict=True):
        values = {name: value for name, value in before.items() if not any(word in name for word in timed)}
        assert values == {name: pytest.approx(after[name], abs=1e-5) for name in values}
    weights = AutoModelForImageTextToText.from_pretrained(second).state_dict()
    for name, value in AutoModelForImageTextToText.from_pretrained(first).state_dict().items():
        assert torch.allclose(value, weights[name], atol=1e-6), name


@pytest.mark.parametrize("recipe", ["stage1_alignment", "stage3_chat", "stage3_gen"])
def test_a_stage_learns_the_same_from_codes_as_from_pixels(recipe, images, codes, model_folder, tmp_path):
    start = {"path": model_folder}
    if recipe == "stage1_alignment":
        start |= {"language_model": "null", "vision_tokenizer": "null"}
    first = run(recipe, images, start, tmp_path / "from_pixels")
    second = run(recipe, codes, start, tmp_path / "from_codes")
    assert_same_training(first, second)
    assert read_record(first)["history"][0]["loss"] > 0


def test_codes_in_memory_teach_the_same(images, codes, model_folder, tmp_path):
    first = run("stage3_chat", codes, {"path": model_folder}, tmp_path / "read")
    second = run("stage3_chat", codes, {"path": model_folder}, tmp_path / "kept", "data.in_memory=true")
    assert_same_training(first, second)


def test_codes_are_streamed(codes, model_folder, tmp_path):
    folder = run("stage3_chat", codes, {"path": model_folder}, tmp_path / "out", "data.streaming=true")
    assert read_record(folder)["steps"] == 3 and read_record(folder)["history"][0]["loss"] > 0


def test_codes_are_mixed_with_other_codes(codes, model_folder, tmp_path):
    mixture = f"data.mixture={{one: {{source: {codes}, weight: 2}}, other: {{source: {codes}}}}}"
    folder = run("stage3_chat", "null", {"path": model_folder}, tmp_path / "out", mixture)
    assert read_record(folder)["steps"] == 3


def test_codes_are_mixed_with_images_in_memory_alone(codes, images, model_folder, tmp_path):
    mixture = f"data.mixture={{one: {{source: {codes}}}, other: {{source: {images}}}}}"
    with pytest.raises(ValueError, match=rf"'{codes}' holds codes and '{images}' images, .* data.in_memory=true"):
        run("stage3_chat", "null", {"path": model_folder}, tmp_path / "out", mixture)
    folder = run("stage3_chat", "null", {"path": model_folder}, tmp_path / "out", mixture, "data.in_memory=true")
    assert read_record(folder)["steps"] == 3


def test_the_whole_road_from_a_tokenizers_folder_by_the_command_line(images, tokenizer_folder, tmp_path):
    def command(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.stderr
        return result

    for machine in ("0/2", "1/2"):
        written = command(
            *("tokenize", images, tmp_path / "codes", "--model", tokenizer_folder),
            *("--shard", machine, "--rows-per-shard", 4, "--batch-size", 3),
        )
    assert "2 rows, 0 skipped" in written.stdout and "images a second" in written.stdout
    fields = ", ".join(f"{name}: {value}" for name, value in LANGUAGE_FIELDS.items())
    start = [f"model.vision_tokenizer={tokenizer_folder}", f"model.language_model={{{fields}}}"]
    command(
        *("train", "stage1_alignment", *TINY, *start, f"data.source={tmp_path / 'codes'}"),
        *("data.verify_codes=true", "--output-dir", tmp_path / "stage1"),
    )
    assert read_record(tmp_path / "stage1")["steps"] == 3


# What cannot be learned from


@pytest.fixture
def unloaded(monkeypatch):
    """Makes loading a model an error."""
    monkeypatch.setattr("ett.train.run.build_model", lambda *args: pytest.fail("a model was loaded"))


def test_codes_of_another_tokenizer_are_refused(images, make_vision_tokenizer, model_folder, unloaded, tmp_path):
    tokenize(images, tmp_path / "codes", make_vision_tokenizer(seed=1).eval())
    with pytest.raises(
        ValueError, match=r"made by 'some/tokenizer' .*\(fingerprint [0-9a-f]{12}\).* would make others"
    ):
        run("stage3_chat", tmp_path / "codes", {"path": model_folder}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_of_images_of_another_size_are_refused(images, tokenizer, model_folder, unloaded, tmp_path):
    tokenize(images, tmp_path / "codes", tokenizer, size=32)
    with pytest.raises(ValueError, match=rf"of 32 x 32 pixels .*`ett tokenize {images} FOLDER .* --image-size 16`"):
        run("stage3_chat", tmp_path / "codes", {"path": model_folder}, tmp_path / "out")


def test_a_new_tokenizer_cannot_learn_from_anothers_codes(codes, unloaded, tmp_path):
    start = {"vision_tokenizer": "{num_vq_embeddings: 32}"}
    with pytest.raises(
        ValueError, match="codes of the tokenizer 'some/tokenizer', and this recipe starts with another"
    ):
        run("stage1_alignment", codes, start, tmp_path / "out")


@pytest.mark.parametrize("recipe", ["tokenizer", "stage2_semantic"])
def test_a_stage_that_reconstructs_images_is_refused_without_pixels(recipe, codes, model_folder, unloaded, tmp_path):
    with pytest.raises(ValueError, match="no pixels: there is nothing to reconstruct"):
        run(recipe, codes, {"path": model_folder}, tmp_path / "out")


def test_a_shard_that_is_missing_is_named(codes, model_folder, unloaded, tmp_path):
    (codes / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"is incomplete: train-00000-of-00001\.parquet is missing"):
        run("stage3_chat", codes, {"path": model_folder}, tmp_path / "out")


def test_a_damaged_shard_is_named_where_the_recipe_asks_for_it(codes, model_folder, unloaded, tmp_path):
    path = codes / "data" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet is damaged: its SHA-256"):
        run("stage3_chat", codes, {"path": model_folder}, tmp_path / "out", "data.verify_codes=true")


def test_texts_alone_are_learned_from_whatever_codes_stand_beside_them(codes, tmp_path):
    fields = ", ".join(f"{name}: {value}" for name, value in LANGUAGE_FIELDS.items())
    vision = "{block_out_channels: [16, 16], down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D], "
    vision += "up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D], layers_per_block: 1, latent_channels: 8, "
    vision += "num_vq_embeddings: 32, vq_embed_dim: 8, norm_num_groups: 4}"
    start = {"vision_tokenizer": vision, "language_model": f"{{{fields}}}"}
    folder = run("demo_language", codes, start, tmp_path / "out")
    assert read_record(folder)["steps"] == 3
