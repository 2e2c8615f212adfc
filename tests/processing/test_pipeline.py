"""The literal `pipeline("image-to-text", model=folder)(image)`, chats by `image-text-to-text` and `any-to-any`, and
drawings by the latter."""

import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import dynamic_module_utils, pipeline, pipelines
from transformers.pipelines.pt_utils import KeyDataset

import ett  # noqa: F401, registers the pipelines
from ett import processing_ett
from ett.processing_ett import ETTAnyToAnyPipeline, ETTImageToTextPipeline, ImageError


@pytest.fixture(scope="module")
def folder(save_model):
    return save_model("ett-chat")


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


def test_the_literal_call_describes_an_image_without_complaint(folder, capfd):
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


def test_an_opened_image_equals_its_file(pipe, folder):
    with Image.open(folder / "red.png") as image:
        assert pipe(image) == pipe(str(folder / "red.png"))


def test_an_array_a_tensor_a_path_and_content_equal_their_file(pipe, folder):
    path = folder / "red.png"
    with Image.open(path) as image:
        array = np.array(image)
    for same in (array, torch.from_numpy(array), path, path.read_bytes()):
        assert pipe(same) == pipe(str(path))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_images_with_prompts_of_different_lengths(pipe, folder, batch_size):
    paths, questions = [folder / "red.png", folder / "blue.png"], ["what color is it?", "a circle?"]
    expected = [
        [{"generated_text": answer(pipe, path, question)}] for path, question in zip(paths, questions, strict=True)
    ]
    assert pipe([str(path) for path in paths], questions, batch_size=batch_size) == expected


def test_prompts_and_images_of_different_numbers(pipe, folder):
    with pytest.raises(ValueError, match="1 images and 2 texts"):
        pipe([str(folder / "red.png")], ["a", "a"])


def test_chats_go_the_way_of_transformers(pipe, folder):
    content = [{"type": "image", "url": str(folder / "red.png")}, {"type": "text", "text": "what color is it?"}]
    (result,) = pipe([{"role": "user", "content": content}], return_full_text=False)
    assert result["generated_text"] == answer(pipe, folder / "red.png", "what color is it?")


def test_missing_image(pipe):
    with pytest.raises(ImageError, match=r"gone.png' is missing"):
        pipe("gone.png")


def test_prompt_beyond_the_vocabulary(pipe, folder):
    with pytest.raises(ValueError, match="The word 'zebra' is beyond"):
        pipe(str(folder / "red.png"), "a zebra")


def test_another_model_behaves_as_in_transformers(pipe, folder, monkeypatch):
    monkeypatch.setattr(pipe.model.config, "model_type", "other")
    with Image.open(folder / "red.png") as image, pytest.raises(ValueError, match="You must provide text"):
        pipe(image)


def test_a_generator_and_a_data_set_of_images_are_read_as_they_go(pipe, folder):
    paths = [str(folder / "red.png"), str(folder / "blue.png"), str(folder / "red.png")]
    expected = pipe(paths, ["what color is it?"] * 3)
    read = []

    def images():
        for path in paths:
            read.append(path)
            yield path

    answers = pipe(images(), "what color is it?")
    assert next(answers) == expected[0] and len(read) < 3
    assert list(answers) == expected[1:]
    rows = Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    for column in (KeyDataset(rows, "image"), rows["image"]):
        assert list(pipe(column, "what color is it?", batch_size=2)) == expected


def test_rows_of_a_data_set_are_not_images(pipe, folder):
    rows = Dataset.from_dict({"image": [str(folder / "red.png")]})
    with pytest.raises(TypeError, match=r'of type dict; expected an image, its path.* KeyDataset\(dataset, "image"\)'):
        list(pipe(rows))


def test_a_generator_of_images_has_one_text(pipe):
    with pytest.raises(ValueError, match="takes one text for all; a list was given"):
        pipe(iter(()), ["a"])


def test_a_url_that_nobody_answers(pipe, free_port):
    with pytest.raises(ImageError, match=rf"^'http://127.0.0.1:{free_port}/red.png' cannot be fetched \(.*\); check"):
        pipe(f"http://127.0.0.1:{free_port}/red.png")


@pytest.mark.parametrize(
    "given", [{}, {"images": None}, {"images": []}, {"text": "a"}, {"images": None, "prompt": "a"}], ids=repr
)
def test_image_to_text_without_an_image(pipe, given):
    message = r"^There is no image; image-to-text needs one, as a path, URL or opened image\.$"
    with pytest.raises(ValueError, match=message):
        pipe(**given)


@pytest.mark.parametrize(("given", "kind"), [(5, "int"), ([None], "NoneType"), ([["red.png"]], "list")])
def test_image_to_text_of_what_is_no_image(pipe, given, kind):
    with pytest.raises(TypeError, match=f"^Got a value of type {kind}; expected an image, its path or URL"):
        pipe(given)


def test_an_empty_question_is_not_the_default_one(pipe, folder):
    with pytest.raises(ValueError, match=r"^The prompt is empty; ask or say something\.$"):
        pipe(str(folder / "red.png"), "")


def test_a_question_with_more_images_than_there_are(pipe, folder):
    with pytest.raises(ValueError, match="Text 0 has 2 <image> and 1 images; give one image for each"):
        pipe(str(folder / "red.png"), "<image> a <image>")


@pytest.mark.parametrize("url", ["http://", "http://[red.png", "https://127.0.0.1:word/red.png"])
def test_a_url_that_is_none(pipe, url):
    with pytest.raises(ImageError, match="cannot be fetched"):
        pipe(url)


# Chats


def said(text: str, *images: Path, role: str = "user") -> dict:
    content = [{"type": "image", "image": str(image)} for image in images]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


@pytest.fixture
def chats(folder):
    """Of unequal length: one image; two in one turn; two in two turns with an answer between."""
    red, blue = folder / "red.png", folder / "blue.png"
    return [
        [said("what color is it?", red)],
        [said("a circle?", blue, red)],
        [said("what color is it?", red), said("red", role="assistant"), said("the top?", blue)],
    ]


@pytest.fixture(scope="module", params=["image-text-to-text", "any-to-any"])
def chat_pipe(request, folder):
    return pipeline(request.param, model=str(folder), max_new_tokens=6, device="cpu")


def test_inputs_stay_in_single_precision_for_a_model_in_half_precision(pipe, chat_pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.model), "dtype", torch.bfloat16)
    assert pipe.dtype == chat_pipe.dtype == torch.float32


def test_a_text_goes_on_from_images_as_by_generate(chat_pipe, folder):
    inputs = chat_pipe.processor(images=str(folder / "red.png"), text="<image> a red")
    ids = chat_pipe.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    (expected,) = chat_pipe.processor.post_process_image_text_to_text(ids)
    (result,) = chat_pipe(images=str(folder / "red.png"), text="<image> a red", return_full_text=False)
    assert result["generated_text"].lstrip() == expected != ""


def test_an_image_with_transparency_is_laid_over_white(chat_pipe):
    clear, white = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGB", (8, 8), "white")
    seen = []
    for image in (clear, white):
        given = {"images": image, "text": "<image>", "videos": None, "audio": None}
        seen.append(chat_pipe.preprocess({key: value for key, value in given.items() if value is not None}))
    assert torch.equal(seen[0]["pixel_values"], seen[1]["pixel_values"])


@pytest.fixture
def no_work(chat_pipe, monkeypatch):
    monkeypatch.setattr(type(chat_pipe.model.model), "forward", lambda *args, **kwargs: pytest.fail("work was done"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ""}, "The prompt is empty; ask or say something."),
        ({"text": []}, "An empty list was given; fill it with images, texts or a chat's messages."),
        ({"text": [[]]}, "An empty list was given; fill it with images, texts or a chat's messages."),
        ({"text": [said(" ")]}, "The last message of the chat is empty; say something in it, or show an image."),
        ({"text": "<image>"}, "The text has 1 <image> and there are 0 images; give one image for each."),
        (
            {"text": [{"role": "user", "content": [{"type": "image"}]}]},
            "The text has 1 <image> and there are 0 images; give one image for each.",
        ),
        (
            {"text": "a", "images": "gone.png"},
            "The text has 0 <image> and there are 1 images; give one image for each.",
        ),
        ({"text": "<image>", "images": "gone.png"}, "'gone.png' is missing; expected an image file."),
        ({"text": [said("a", "gone.png")]}, "'gone.png' is missing; expected an image file."),
        (
            {"text": "a red circle " * 50},
            "The prompt has 150 tokens, images included, and the language model's context ends at 64; shorten it.",
        ),
        (
            {"text": [said("a red circle " * 50)]},
            "The prompt has 155 tokens, images included, and the language model's context ends at 64; shorten it.",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_answered_is_said_before_any_work(chat_pipe, no_work, monkeypatch, given, message):
    monkeypatch.setattr(chat_pipe.model.config.text_config, "max_position_embeddings", 64)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chat_pipe(**given)


@pytest.mark.parametrize("images", ["red.png", ["red.png"]])
def test_image_text_to_text_of_images_without_a_text(folder, images):
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"^Images were given without a text; give one, or use pipeline\("):
        pipe(images)


def test_a_chat_is_answered_as_by_generate(chat_pipe, chats):
    inputs = chat_pipe.processor.apply_chat_template(
        chats[2], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert inputs["pixel_values"].shape[0] == 2
    ids = chat_pipe.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    (expected,) = chat_pipe.processor.post_process_image_text_to_text(ids)
    (result,) = chat_pipe(text=chats[2], return_full_text=False)
    assert result["generated_text"].lstrip() == expected != ""


def test_a_full_answer_is_the_chat_with_one_more_turn(chat_pipe, chats):
    (result,) = chat_pipe(text=chats[0])
    assert result["generated_text"][:-1] == chats[0]
    (answer,) = chat_pipe(text=chats[0], return_full_text=False)
    assert result["generated_text"][-1] == {"role": "assistant", "content": answer["generated_text"]}


def test_chats_of_unequal_length_in_a_batch_are_answered_as_each_alone(chat_pipe, chats):
    alone = [chat_pipe(text=chat, return_full_text=False) for chat in chats]
    assert len({answers[0]["generated_text"] for answers in alone}) > 1
    assert chat_pipe(text=chats, return_full_text=False, batch_size=3) == alone


# Any to any


@pytest.fixture(scope="module")
def any_pipe(save_model):
    return pipeline("any-to-any", model=str(save_model("ett-gen", visual_head=True)), max_new_tokens=6, device="cpu")


GREEDY = {"generation_mode": "image", "generate_kwargs": {"do_sample": False}}


def drawn(pipe, prompt: str, **options):
    codes = pipe.model.generate(
        **pipe.processor(text=prompt, generation_mode="image", **options), generation_mode="image", do_sample=False
    )
    return pipe.processor.post_process_images(pipe.model.decode_image_tokens(codes))[0]


def test_drawing_by_any_to_any_is_that_of_generate(any_pipe):
    assert isinstance(any_pipe, ETTAnyToAnyPipeline)
    (result,) = any_pipe(text="a red circle", **GREEDY)
    assert result == {"input_text": "a red circle", "generated_image": drawn(any_pipe, "a red circle")}


def test_a_text_s_limits_say_nothing_about_a_drawing(any_pipe):
    (result,) = any_pipe(text="a red circle", max_new_tokens=1, stop_sequence="a", **GREEDY)
    assert result["generated_image"] == drawn(any_pipe, "a red circle")


def test_drawing_several_prompts(any_pipe):
    prompts = ["a red circle", "a"]
    results = any_pipe(text=prompts, **GREEDY)
    assert [result["input_text"] for result in results] == prompts
    assert [result["generated_image"] for result in results] == [drawn(any_pipe, prompt) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_drawing_several_images_of_each_of_several_chats(any_pipe, folder, batch_size):
    chats = [[said("a red circle", folder / "red.png")], [said("a", folder / "blue.png")]]
    options = {"num_return_sequences": 2, "do_sample": False}
    results = any_pipe(text=chats, generation_mode="image", generate_kwargs=options, batch_size=batch_size)
    assert [len(group) for group in results] == [2, 2]
    for chat, path, group in zip(chats, ("red.png", "blue.png"), results, strict=True):
        prompt = any_pipe.processor.apply_chat_template(chat, add_generation_prompt=True)
        expected = drawn(any_pipe, prompt, images=str(folder / path))
        assert group == [{"input_text": chat, "generated_image": expected}] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": " "}, "The prompt is empty; say what to draw."),
        ({"text": [said("")]}, "The last message of the chat is empty; say something in it, or show an image."),
        ({"text": "<image>"}, "The text has 1 <image> and there are 0 images; give one image for each."),
        (
            {"text": "a", "image_size": 8},
            "image_size is 8; expected height and width, positive multiples of 2 pixels.",
        ),
        (
            {"text": "a", "image_size": (7, 8)},
            "image_size is (7, 8); expected height and width, positive multiples of 2 pixels.",
        ),
        (
            {"text": "a red circle " * 16},
            "The prompt has 49 tokens and the image 16 codes, together more than the 64 of the language model's "
            "context; shorten the prompt or draw a smaller image.",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_drawn_is_said_before_any_work(any_pipe, monkeypatch, given, message):
    monkeypatch.setattr(type(any_pipe.model.model), "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    monkeypatch.setattr(any_pipe.model.config.text_config, "max_position_embeddings", 64)
    options = {"image_size": given["image_size"]} if "image_size" in given else {}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        any_pipe(text=given["text"], generation_mode="image", generate_kwargs=options)


def test_a_chat_model_asked_for_an_image_by_any_to_any(folder):
    pipe = pipeline("any-to-any", model=str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"no visual head .* cannot generate"):
        pipe(text="a red circle", generation_mode="image")


# Registration and remote code


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


def test_a_saved_pipeline_is_a_whole_folder(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline("image-to-text", model=str(tmp_path / "saved"), max_new_tokens=6, device="cpu")
    assert again(str(folder / "red.png")) == pipe(str(folder / "red.png"))
