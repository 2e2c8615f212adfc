"""The literal `pipeline("image-to-text", model=folder)(picture)`, with and without a prompt."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM, dynamic_module_utils, pipeline, pipelines

import ett
import processing_ett
from processing_ett import ETTImageToTextPipeline, ETTProcessor, ImageError, build_word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ETT-Chat with random weights, as training leaves it, and two pictures."""
    torch.manual_seed(0)
    vision_tokenizer = ett.IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
        vq_embed_dim=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    tokenizer = build_word_tokenizer(["a red circle, at the top.", "what color is it?"])
    processor = ETTProcessor.from_parts(tokenizer, vision_tokenizer, image_size=8)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = ett.ETTForConditionalGeneration.from_parts(
        Qwen2ForCausalLM(config),
        vision_tokenizer,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_size=8,
    )
    folder = tmp_path_factory.mktemp("model") / "ett-chat"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.new("RGB", (10, 8), "red").save(folder / "red.png")
    Image.new("RGB", (8, 12), "blue").save(folder / "blue.png")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-to-text", model=str(folder), max_new_tokens=6, device="cpu")


def answer(pipe, path: Path, question: str) -> str:
    """What the model says, without the pipeline."""
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": question}]
    inputs = pipe.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = pipe.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    return pipe.processor.post_process_image_text_to_text(ids)[0]


def test_the_literal_call_describes_a_picture_without_complaint(folder, capfd):
    pipe = pipeline("image-to-text", model=str(folder), device="cpu")
    assert isinstance(pipe, ETTImageToTextPipeline)
    (result,) = pipe(str(folder / "red.png"), max_new_tokens=6)
    assert result == {"generated_text": answer(pipe, folder / "red.png", pipe.processor.caption_prompt)}
    printed = capfd.readouterr().err
    assert "Traceback" not in printed and "has been removed" not in printed


def test_a_prompt_asks_something_else(pipe, folder):
    expected = [{"generated_text": answer(pipe, folder / "red.png", "what color is it?")}]
    assert pipe(str(folder / "red.png"), "what color is it?") == expected
    assert pipe(str(folder / "red.png"), prompt="what color is it?") == expected


def test_an_opened_picture_equals_its_file(pipe, folder):
    with Image.open(folder / "red.png") as picture:
        assert pipe(picture) == pipe(str(folder / "red.png"))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_pictures_with_prompts_of_different_lengths(pipe, folder, batch_size):
    paths, questions = [folder / "red.png", folder / "blue.png"], ["what color is it?", "a circle?"]
    expected = [
        [{"generated_text": answer(pipe, path, question)}] for path, question in zip(paths, questions, strict=True)
    ]
    assert pipe([str(path) for path in paths], questions, batch_size=batch_size) == expected


def test_prompts_and_pictures_of_different_numbers(pipe, folder):
    with pytest.raises(ValueError, match="1 pictures and 2 texts"):
        pipe([str(folder / "red.png")], ["a", "a"])


def test_chats_go_the_way_of_transformers(pipe, folder):
    content = [{"type": "image", "url": str(folder / "red.png")}, {"type": "text", "text": "what color is it?"}]
    (result,) = pipe([{"role": "user", "content": content}], return_full_text=False)
    assert result["generated_text"] == answer(pipe, folder / "red.png", "what color is it?")


def test_missing_picture(pipe):
    with pytest.raises(ImageError, match=r"gone.png' is missing"):
        pipe("gone.png")


def test_prompt_beyond_the_vocabulary(pipe, folder):
    with pytest.raises(ValueError, match="The word 'zebra' is beyond"):
        pipe(str(folder / "red.png"), "a zebra")


def test_inputs_stay_in_single_precision_for_a_model_in_half_precision(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.model), "dtype", torch.bfloat16)
    assert pipe.dtype == torch.float32


def test_another_model_behaves_as_in_transformers(pipe, folder, monkeypatch):
    monkeypatch.setattr(pipe.model.config, "model_type", "other")
    with Image.open(folder / "red.png") as picture, pytest.raises(ValueError, match="You must provide text"):
        pipe(picture)


def test_other_removed_tasks_are_still_explained():
    with pytest.raises(KeyError, match="has been removed from transformers"):
        pipelines.check_task("vqa")


def test_the_files_run_flat_as_remote_code(tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    export = tmp_path / "export"
    export.mkdir()
    for file in Path(processing_ett.__file__).parent.glob("*.py"):
        if file.name != "__init__.py":
            shutil.copy(file, export)
    for reference in (
        "image_processing_ett.ETTImageProcessor",
        "processing_ett.ETTProcessor",
        "pipeline_ett.ETTImageToTextPipeline",
    ):
        loaded = dynamic_module_utils.get_class_from_dynamic_module(reference, str(export))
        assert loaded.__name__ == reference.split(".")[1] and loaded.__module__.startswith("transformers_modules")
