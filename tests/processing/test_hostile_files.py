"""Damaged or hostile files of a processor, and of a dataset, are a `ValueError` of one sentence."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ett.data_ett.image_rows import image_name, read_rows
from ett.processing_ett import ETTImageProcessor, ETTProcessor

OURS = {"image_processor_type": "ETTImageProcessor"}


@pytest.fixture
def folder(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refusal(load, *arguments):
    with pytest.raises(ValueError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("spatial_factor", 0, "spatial_factor is 0; expected a whole number of pixels above 0"),
        ("image_token", ["<image>"], "image_token is ['<image>']; expected a text"),
        ("image_processor", {**OURS, "size": {"height": "x", "width": 8}}, "expected a 'height' and a 'width'"),
        ("image_processor", {**OURS, "size": {"height": 8192, "width": 8192}}, "codes; expected at most 65536"),
        ("image_processor", 5, "cannot be used"),
    ],
)
def test_a_processor_out_of_range_is_one_sentence(folder, field, value, message):
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert message in refusal(ETTProcessor.from_pretrained, folder)


@pytest.mark.parametrize("content", ["{", '{"version": "1.0", "model": {"type": "WordLevel"}}', "[]"])
def test_a_damaged_text_tokenizer_is_one_sentence(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert f"The processor of '{folder}' cannot be used" in refusal(ETTProcessor.from_pretrained, folder)


@pytest.mark.parametrize(
    "template", ["{% if", "{{ messages.a.b }}", "{{ raise_exception('Roles\\nmust alternate.') }}"]
)
def test_a_chat_template_that_cannot_be_used_is_one_sentence(processor, template):
    processor.chat_template = template
    chat = [{"role": "user", "content": "a red circle"}]
    assert "The chat template cannot write this chat: " in refusal(processor.apply_chat_template, chat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": 5}, "fit is 5; expected one of crop, pad, stretch"),
        ({"resample": "best"}, "resample is 'best'; expected the number of one of Pillow's filters"),
        ({"max_image_pixels": -1}, "max_image_pixels is -1; expected a whole number above 0"),
    ],
)
def test_an_image_processor_out_of_range_is_one_sentence(options, message):
    assert message in refusal(lambda: ETTImageProcessor(**options))


def test_a_file_replaces_no_method_of_an_image_processor(image):
    image_processor = ETTImageProcessor(size=16, preprocess=5, fetch_images="x", rescale_factor="y")
    assert image_processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", ['null\n{"text": "a"}', ' [null, {"text": "a"}]'])
def test_null_in_the_place_of_the_first_row_is_one_sentence(folder, content, streaming):
    (folder / "rows.jsonl").write_text(content)
    message = refusal(read_rows, str(folder / "rows.jsonl"), None, streaming)
    assert "the first row of" in message and "is null; expected a mapping" in message


def test_null_before_the_metadata_of_images_is_one_sentence(folder):
    Image.new("RGB", (4, 4)).save(folder / "0.png")
    for path in folder.glob("*.json"):
        path.unlink()
    (folder / "metadata.jsonl").write_text('null\n{"file_name": "0.png", "text": "a"}')
    assert "is null; expected a mapping" in refusal(read_rows, str(folder), None)


def test_a_table_that_describes_itself_wrongly_is_one_sentence(folder):
    table = pyarrow.table({"text": ["a"]}).replace_schema_metadata({"huggingface": '{"info": {"features": 5}}'})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    assert "could not be read as a dataset: " in refusal(read_rows, str(folder / "rows.parquet"), None)


@pytest.mark.parametrize("cell", ["x" * 5000, [{"bytes": b"", "path": "x" * 5000}], "data:image/png;base64,", None])
def test_a_row_without_a_name_that_fits_in_a_sentence_goes_by_its_number(cell):
    assert image_name(cell, 7) == "row 7"
