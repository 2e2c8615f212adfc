"""Damaged or hostile files of a model are a `ValueError` of one sentence, before anything large is built."""

import json

import pytest

from ett.modeling_ett.configuration_ett import ETTConfig
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel


@pytest.fixture
def model_folder(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokenizer_folder(make_vision_tokenizer, tmp_path):
    make_vision_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(path, **fields):
    """Sets fields of a file of JSON; `a__b` is the field b of the mapping a."""
    content = json.loads(path.read_text())
    for name, value in fields.items():
        *sections, last = name.split("__")
        target = content
        for section in sections:
            target = target[section]
        target[last] = value
    path.write_text(json.dumps(content))


def refusal(load, folder):
    with pytest.raises(ValueError) as caught:
        load.from_pretrained(folder)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visual_head": 7}, "Field 'visual_head' expected bool, got int"),
        ({"image_token_id": "x" * 9999}, "Field 'image_token_id' expected int, got str"),
        ({"image_size": -1}, "image_size is -1; expected 1 to 32768 pixels"),
        ({"text_config": []}, "text_config"),
        ({"text_config__num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648; expected 1 to 1000 layers"),
        ({"text_config__hidden_size": -16}, "text_config cannot be used"),
        ({"text_config__num_attention_heads": 0}, "cannot be used (ZeroDivisionError"),
        ({"vq_config__layers_per_block": 10**9}, "layers_per_block is 1000000000; expected a whole number from 1 to"),
    ],
)
def test_a_configuration_out_of_range_is_one_sentence(model_folder, fields, message):
    change(model_folder / "config.json", **fields)
    assert message in refusal(ETTForConditionalGeneration, model_folder)


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000])
@pytest.mark.parametrize("load", [ETTConfig, ETTForConditionalGeneration])
def test_a_configuration_without_fields_is_one_sentence(model_folder, load, content):
    (model_folder / "config.json").write_text(content)
    assert "cannot be used" in refusal(load, model_folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_vq_embeddings": "32"}, "num_vq_embeddings is '32'; expected a whole number from 1 to"),
        ({"patch_size": True}, "patch_size is True; expected a whole number from 1 to 256"),
        ({"pixel_std": 0}, "pixel_std is 0; expected a number above 0"),
        ({"logit_scale": None}, "logit_scale is None; expected a number"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "expected a list of DownEncoderBlock2D and Attn"),
        ({"block_out_channels": [16, 15]}, "block_out_channels is [16, 15]; expected a list of multiples of"),
        ({"block_out_channels": [16]}, "There are 2 down_block_types, 2 up_block_types and 1 block_out_channels"),
    ],
)
def test_a_tokenizer_of_impossible_sizes_is_one_sentence(tokenizer_folder, fields, message):
    change(tokenizer_folder / "config.json", **fields)
    assert message in refusal(IBQModel, tokenizer_folder)


def test_a_tokenizers_configuration_without_fields_is_one_sentence(tokenizer_folder):
    (tokenizer_folder / "config.json").write_text("[1]")
    assert "holds a list; expected a mapping of fields" in refusal(IBQModel, tokenizer_folder)


@pytest.mark.parametrize("length", [0, 4, 1000, -8])
def test_damaged_weights_are_one_sentence(model_folder, length):
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    assert f"The model '{model_folder}' cannot be used" in refusal(ETTForConditionalGeneration, model_folder)


def test_weights_of_another_model_are_one_sentence(model_folder, make_model, make_language_model):
    make_model(make_language_model(hidden_size=64)).save_pretrained(model_folder.parent / "other")
    (model_folder.parent / "other" / "model.safetensors").rename(model_folder / "model.safetensors")
    assert f"The model '{model_folder}' cannot be used" in refusal(ETTForConditionalGeneration, model_folder)


def test_a_missing_file_is_still_an_os_error(model_folder):
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named"):
        ETTForConditionalGeneration.from_pretrained(model_folder)
