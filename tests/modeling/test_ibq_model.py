"""The tokenizer: diffusers' encoder and decoder around our quantizer."""

import json

import pytest
import torch
from diffusers import VQModel

from ett.modeling_ett.modeling_ibq import IBQModel


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def fields(model):
    """The configuration as JSON would hold it, lists for tuples, without diffusers' own notes."""
    return {key: json.loads(json.dumps(value)) for key, value in model.config.items() if not key.startswith("_")}


def test_encoder_and_decoder_are_those_of_a_stock_vq_model(make_vision_tokenizer, pixels):
    ours = make_vision_tokenizer(patch_size=1)
    names = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels")
    names += ("num_vq_embeddings", "vq_embed_dim", "norm_num_groups", "mid_block_add_attention")
    stock = VQModel(**{name: ours.config[name] for name in names})
    stock.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        latents = ours.encode(pixels).latents
        assert torch.equal(latents, stock.encode(pixels).latents)
        decoded = ours.decode(latents, force_not_quantize=True).sample
        assert torch.equal(decoded, stock.decode(latents, force_not_quantize=True).sample)


def test_by_default_it_is_the_papers_tokenizer():
    with torch.device("meta"):
        model = IBQModel()
    assert model.spatial_factor == 16
    assert tuple(model.quantize.embedding.weight.shape) == (131072, 256)
    assert sum(parameter.numel() for parameter in model.parameters()) == 140_342_147


def test_saved_and_loaded_it_is_the_same(make_vision_tokenizer, pixels, tmp_path):
    model = make_vision_tokenizer(l2_normalize=True, logit_scale=30.0)
    model.save_pretrained(tmp_path)
    loaded = IBQModel.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "IBQModel"
    assert fields(loaded) == fields(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(pixels).sample, model(pixels).sample)


def test_a_changed_gradient_path_is_saved_and_moves_no_code(make_vision_tokenizer, pixels, tmp_path):
    model = make_vision_tokenizer(logit_scale=2.0)
    codes = model.encode_codes(pixels)
    model.set_gradient_path(straight_through_weight=0.1)
    model.save_pretrained(tmp_path)
    loaded = IBQModel.from_pretrained(tmp_path)
    assert (loaded.quantize.logit_scale, loaded.quantize.straight_through_weight) == (2.0, 0.1)
    assert torch.equal(loaded.encode_codes(pixels), codes)


def test_a_folder_from_before_the_straight_through_copy_has_none(make_vision_tokenizer, tmp_path):
    make_vision_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["straight_through_weight"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert IBQModel.from_pretrained(tmp_path).quantize.straight_through_weight == 0


@pytest.mark.parametrize("size", [(18, 16), (16, 18), (2, 16), (0, 16)])
def test_sides_that_do_not_divide_into_codes_are_an_error(make_vision_tokenizer, size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels .* multiples of 4"):
        make_vision_tokenizer().encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(("patch_size", "grid"), [(1, (8, 12)), (2, (4, 6)), (4, (2, 3))])
def test_pixel_blocks_are_folded_before_the_encoder_and_unfolded_after_the_decoder(
    make_vision_tokenizer, pixels, patch_size, grid
):
    model = make_vision_tokenizer(patch_size=patch_size)
    output = model(pixels)
    assert model.spatial_factor == 2 * patch_size
    assert model.encoder.conv_in.in_channels == 3 * patch_size**2
    assert tuple(output.quantized.codes.shape) == (2, *grid)
    assert output.sample.shape == pixels.shape


def test_decoding_codes_equals_decoding_latents(make_vision_tokenizer, pixels):
    model = make_vision_tokenizer()
    with torch.no_grad():
        latents = model.encode(pixels).latents
        codes = model.quantize(latents).codes
        assert torch.equal(model.decode_codes(codes).sample, model.decode(latents).sample)
        assert torch.equal(model.decode_codes(codes).sample, model(pixels).sample)


def test_codes_are_made_in_single_precision_even_under_autocast(make_vision_tokenizer, pixels):
    model = make_vision_tokenizer(num_vq_embeddings=512)
    expected = model(pixels).quantized.codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = model.encode_codes(pixels)
        flipped = model(pixels).quantized.codes != expected
    assert torch.equal(codes, expected)
    assert bool(flipped.any()), "bf16 must make a difference, or this test shows nothing"


@pytest.fixture
def tf32():
    """What computes in TF32, which is allowed while a test runs."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32"
    yield backends
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


def test_codes_are_made_without_tf32_which_is_allowed_again_afterwards(make_vision_tokenizer, pixels, tf32):
    model, seen = make_vision_tokenizer(), []
    model.encoder.register_forward_hook(lambda *_: seen.extend(backend.fp32_precision for backend in tf32))
    model.encode_codes(pixels)
    assert seen == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in tf32] == ["tf32", "tf32"]


def test_the_call_reports_codes_and_losses(make_vision_tokenizer, pixels):
    output = make_vision_tokenizer()(pixels)
    assert output.commit_loss is output.quantized.quantization_loss
    assert output.quantized.codes.unique().numel() > 1
    assert output.quantized.entropy_loss.requires_grad


def test_tuples_hold_what_the_dataclasses_do(make_vision_tokenizer, pixels):
    model = make_vision_tokenizer()
    with torch.no_grad():
        (latents,) = model.encode(pixels, return_dict=False)
        sample, commit_loss = model.decode(latents, return_dict=False)
        assert torch.equal(latents, model.encode(pixels).latents)
        assert torch.equal(sample, model(pixels, return_dict=False)[0])
        assert torch.equal(commit_loss, model(pixels).commit_loss)


@pytest.mark.parametrize("code", [-1, 32])
def test_a_code_beyond_the_codebook_is_an_error(make_vision_tokenizer, code):
    with pytest.raises(ValueError, match=rf"between .*{code}.*0 to 31"):
        make_vision_tokenizer().decode_codes(torch.tensor([[[3, code]]]))


def test_flat_codes_are_an_error(make_vision_tokenizer):
    with pytest.raises(ValueError, match=r"shape \(16,\); expected \(batch_size, height, width\)"):
        make_vision_tokenizer().decode_codes(torch.zeros(16, dtype=torch.long))


def test_pixels_are_centred_before_the_encoder_and_put_back_after_the_decoder(make_vision_tokenizer, pixels):
    plain, centred = make_vision_tokenizer(), make_vision_tokenizer(pixel_mean=0.5, pixel_std=0.25)
    with torch.no_grad():
        latents = centred.encode(pixels).latents
        assert torch.equal(latents, plain.encode((pixels - 0.5) / 0.25).latents)
        assert torch.equal(centred.decode(latents).sample, plain.decode(latents).sample * 0.25 + 0.5)
