"""Fingerprints: what changes an image's codes changes them, and nothing else does."""

import json

import pytest
import safetensors.torch
import torch

from ett.data_ett.fingerprint import fingerprint, folder_fingerprint
from ett.processing_ett import ETTImageProcessor


@pytest.fixture
def image_processor():
    return ETTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture
def tokenizer(make_vision_tokenizer):
    return make_vision_tokenizer()


@pytest.fixture
def folder(tokenizer, image_processor, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    image_processor.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_tokenizer_has_one_in_memory_in_its_folder_and_in_an_ett_models(
    tokenizer, image_processor, folder, make_model, processor, tmp_path
):
    model = make_model(vision_tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    expected = fingerprint(tokenizer, image_processor)
    assert len(expected) == 64
    assert folder_fingerprint(folder) == expected
    assert folder_fingerprint(tmp_path / "model", image_processor) == expected
    assert fingerprint(model.model.vision_tokenizer, image_processor) == expected
    # The processor beside this model makes images of 64 pixels.
    assert folder_fingerprint(tmp_path / "model") == fingerprint(tokenizer, processor.image_processor) != expected


def test_weights_in_several_files_have_the_same_one(tokenizer, image_processor, make_model, tmp_path):
    make_model(vision_tokenizer=tokenizer).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert folder_fingerprint(tmp_path / "model", image_processor) == fingerprint(tokenizer, image_processor)


def test_weights_of_lower_precision_have_that_of_the_same_weights_in_full(tokenizer, folder):
    halved = {name: value.bfloat16() for name, value in tokenizer.state_dict().items()}
    safetensors.torch.save_file(halved, folder / "diffusion_pytorch_model.safetensors")
    in_half = folder_fingerprint(folder)
    in_full = {name: value.float() for name, value in halved.items()}
    safetensors.torch.save_file(in_full, folder / "diffusion_pytorch_model.safetensors")
    assert folder_fingerprint(folder) == in_half


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "quant_conv.bias", "quantize.embedding.weight"])
def test_a_change_of_what_encodes_changes_it(tokenizer, image_processor, name):
    before = fingerprint(tokenizer, image_processor)
    with torch.no_grad():
        tokenizer.get_parameter(name).view(-1)[0] += 1e-3
    assert fingerprint(tokenizer, image_processor) != before


@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "post_quant_conv.bias"])
def test_a_change_of_what_decodes_does_not(tokenizer, image_processor, name):
    before = fingerprint(tokenizer, image_processor)
    with torch.no_grad():
        tokenizer.get_parameter(name).view(-1)[0] += 1e-3
    assert fingerprint(tokenizer, image_processor) == before


@pytest.mark.parametrize(
    ("field", "value", "changes"),
    [("pixel_mean", 0.5, True), ("l2_normalize", True, True), ("logit_scale", 3.0, False)],
)
def test_a_field_of_the_configuration_changes_it_where_it_changes_codes(folder, field, value, changes):
    before = folder_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    assert (folder_fingerprint(folder) != before) == changes


@pytest.mark.parametrize("changes", [{"size": {"height": 16, "width": 32}}, {"resample": 2}])
def test_another_way_to_prepare_images_changes_it(tokenizer, image_processor, changes):
    fields = {"size": {"height": 16, "width": 16}, **changes}
    assert fingerprint(tokenizer, ETTImageProcessor(**fields)) != fingerprint(tokenizer, image_processor)


def test_a_folder_without_a_tokenizers_weights_is_an_error(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights of a vision tokenizer in safetensors"):
        folder_fingerprint(folder)
