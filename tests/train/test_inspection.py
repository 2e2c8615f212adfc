"""The page of a batch: what it shows of tokens, images and counts, and what it does not need."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ett import scenes_ett
from ett.cli import app
from ett.train import ETTCollator, PreparedDataset, SceneExamples
from ett.train.planning.inspection import Piece, inspect_data, mosaic, render, show
from ett.train.recipes import Recipe

IMAGE_TOKEN = "<image>"
NUM_CODES = 81


def prepared(processor, task, **options):
    examples = SceneExamples(task, 0, "train", 4, questions_per_scene=3, **options)
    return PreparedDataset(examples, task, processor, **options)


def page_of(items, processor, skipped=None):
    recipe = Recipe(title="A title", task="caption")
    filters = [{"type": "resolution", "min_side": 512, "seen": 4100, "removed": 1200}]
    return render(recipe, items, ETTCollator()(items), processor, skipped or {}, filters)


def images_of(page):
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in encoded]


def test_tokens_are_shown_as_text_with_what_is_predicted_apart_and_placeholders_counted(processor):
    dataset = prepared(processor, "caption")
    shown = show(dataset[0], processor)
    assert Piece("image", f"{IMAGE_TOKEN} x {NUM_CODES}", False) in shown.pieces
    predicted = [piece for piece in shown.pieces if piece.is_predicted]
    text = processor.tokenizer.decode(processor.tokenizer(dataset.examples[0]["text"])["input_ids"])
    assert predicted == [Piece("text", text, True), Piece("special", "<|im_end|>", True)]
    assert shown.length == len(dataset[0]["input_ids"])
    assert shown.predicted == sum(label != -100 for label in dataset[0]["labels"])


def test_of_a_drawing_the_codes_are_predicted(processor):
    shown = show(prepared(processor, "drawing")[0], processor, predicts_codes=True)
    assert [piece.kind for piece in shown.pieces if piece.is_predicted] == ["image"]
    assert shown.predicted == NUM_CODES


def test_turns_that_do_not_see_one_another_are_shown_apart(processor):
    shown = show(prepared(processor, "chat", independent_turns=True)[0], processor)
    assert [piece.branch for piece in shown.pieces] == sorted(piece.branch for piece in shown.pieces)
    answers = {piece.branch for piece in shown.pieces if piece.is_predicted}
    assert answers == set(range(1, max(answers) + 1)) and len(answers) >= 3


def test_images_are_those_that_the_model_sees(processor):
    page = page_of([prepared(processor, "caption")[0]], processor)
    (image,) = images_of(page)
    assert np.array_equal(np.asarray(image), np.asarray(scenes_ett.Scenes(0, "train")[0].render()))


def test_codes_are_shown_as_a_mosaic_of_one_colour_for_each(processor):
    codes = torch.tensor([[[3, 70_000], [70_001, 3]]])
    colours = np.asarray(mosaic(codes[0]))[4::8, 4::8].reshape(4, 3).tolist()
    assert colours[0] == colours[3]
    assert len({tuple(colour) for colour in colours}) == 3
    page = page_of([{"name": "coded", "image_codes": codes}], processor)
    assert "what they show only the tokenizer knows" in page and len(images_of(page)) == 1


def test_the_batch_is_summed_up(processor):
    items = [
        {"name": "a", "input_ids": [7, 8, 9], "labels": [-100, 8, 9]},
        {"name": "b", "input_ids": [9], "labels": [9]},
    ]
    page = page_of(items, processor)
    figures = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page))
    assert figures == {
        "Examples in the batch": "2",
        "Tokens": "4",
        "Longest example": "3",
        "Predicted": "75.0%",
        "Padding": "33.3%",
        "Skipped so far": "0",
    }
    assert "<td>input_ids</td><td>2 x 3</td><td>int64</td>" in page
    assert "<td>resolution</td><td>4,100</td><td>1,200</td>" in page


def test_skipped_images_are_named_and_html_in_the_data_is_shown_and_not_obeyed(processor):
    skipped = {f"<b>{number}.png": "It is <torn>." for number in range(23)}
    item = {"name": "<script>alert(1)</script>", "input_ids": [7], "labels": [7]}
    page = page_of([item], processor, skipped)
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>" not in page and "&lt;b&gt;0.png</td><td>It is &lt;torn&gt;.</td>" in page
    assert "and 3 more." in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.fixture
def bare_model(make_model, make_language_model, make_vision_tokenizer, processor, tmp_path):
    """Folder of an ETT model without its weights."""
    model = make_model(
        make_language_model(vocab_size=len(processor.tokenizer)),
        make_vision_tokenizer(block_out_channels=(16, 16), patch_size=4),
        image_token_id=processor.image_token_id,
    )
    model.config.save_pretrained(tmp_path / "ett")
    processor.save_pretrained(tmp_path / "ett")
    return str(tmp_path / "ett")


@pytest.mark.parametrize("recipe", ["demo_semantic", "demo_chat", "demo_gen", "demo_language"])
def test_a_recipes_data_are_shown_without_any_weights(bare_model, tmp_path, recipe):
    overrides = [f"model.path={bare_model}", "data.length=20"]
    page = inspect_data(recipe, overrides, tmp_path / "page.html", 3).read_text()
    assert page.count("<article>") == 3
    assert len(images_of(page)) == (0 if recipe == "demo_language" else 3)
    assert inspect_data(recipe, overrides, tmp_path / "again.html", 3).read_text() == page


def test_new_models_and_tokenizers_need_no_weights_either(tmp_path, make_vision_tokenizer):
    make_vision_tokenizer(patch_size=4).save_config(tmp_path / "tokenizer")
    parts = [f"model.vision_tokenizer={tmp_path / 'tokenizer'}", "model.language_model={hidden_size: 32}"]
    sizes = ["model.path=null", "model.image_size=72", "data.length=20"]
    page = inspect_data("demo_alignment", [*parts, *sizes], tmp_path / "page.html", 1).read_text()
    assert f"&lt;image&gt; x {NUM_CODES}" in page


def test_of_packed_examples_each_ones_row_is_told(bare_model, tmp_path):
    packed = ["data.length=20", "data.packing=true", "data.in_memory=false", "data.max_length=200"]
    page = inspect_data("demo_gen", [f"model.path={bare_model}", *packed], tmp_path / "page.html", 4).read_text()
    rows = [int(row) for row in re.findall(r"in row (\d+) of the batch", page)]
    (height, _) = re.search(r"<td>input_ids</td><td>(\d+) x (\d+)</td>", page).groups()
    assert sorted(rows) == [1, 1, 2, 2] and height == "2"


def test_of_a_stream_the_first_examples_are_shown(bare_model, tmp_path):
    streamed = ["data.streaming=true", "data.in_memory=false", "training.max_steps=1"]
    overrides = [f"model.path={bare_model}", "data.length=20", *streamed]
    assert inspect_data("demo_gen", overrides, tmp_path / "page.html", 3).read_text().count("<article>") == 3


def test_the_command_writes_the_page(tmp_path):
    target = tmp_path / "page.html"
    result = CliRunner().invoke(
        app, ["inspect-data", "demo_tokenizer", "data.length=20", "-n", "2", "-o", str(target)]
    )
    assert result.exit_code == 0, result.output
    assert f"Wrote {target}." in result.output
    assert len(images_of(target.read_text())) == 2


def test_a_folder_that_is_missing_is_an_error_before_the_data_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder '.*absent' to write 'page\.html' into"):
        inspect_data("no recipe", output=tmp_path / "absent" / "page.html")
