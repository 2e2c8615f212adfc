"""Images of any size, and large ones in tiles and slices: the same result with less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def make_local_tokenizer(make_vision_tokenizer):
    """Makes a tokenizer whose outputs depend on nearby pixels alone: neither attention nor normalization."""

    def make():
        model = make_vision_tokenizer(mid_block_add_attention=False)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(parent, name, nn.Identity())
        return model

    return make


def smooth_image(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([rows, columns, rows * columns])[None]


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def shapes_seen(module: nn.Module) -> list[tuple[int, ...]]:
    """Receives the shape of everything that goes into `module` from here on."""
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 36), (20, 12), (64, 8)])
def test_any_sides_that_divide_into_codes_go_there_and_back(make_vision_tokenizer, height, width):
    model, pixels = make_vision_tokenizer(), noise(2, 3, height, width)
    with torch.no_grad():
        output = model(pixels)
        assert output.quantized.codes.shape == (2, height // 4, width // 4)
        assert output.sample.shape == pixels.shape
        assert torch.equal(model.decode_codes(output.quantized.codes).sample, output.sample)


@torch.no_grad()
def test_a_batch_in_slices_is_the_batch_as_a_whole(make_vision_tokenizer):
    model, pixels = make_vision_tokenizer(), noise(3, 3, 16, 24)
    whole = model(pixels)
    model.enable_slicing()
    batches = shapes_seen(model.encoder), shapes_seen(model.decoder)
    sliced = model(pixels)
    assert [[shape[0] for shape in shapes] for shapes in batches] == [[1, 1, 1], [1, 1, 1]]
    assert torch.equal(sliced.quantized.codes, whole.quantized.codes)
    torch.testing.assert_close(sliced.sample, whole.sample)
    torch.testing.assert_close(sliced.commit_loss, whole.commit_loss)
    model.disable_slicing()
    model(pixels)
    assert [shapes[-1][0] for shapes in batches] == [3, 3]


@torch.no_grad()
def test_images_within_a_tile_come_out_exactly_as_without_tiling(make_vision_tokenizer):
    model, pixels = make_vision_tokenizer(), noise(2, 3, 32, 24)
    whole = model(pixels)
    model.enable_tiling(tile_sample_min_size=32)
    tiled = model(pixels)
    assert torch.equal(tiled.quantized.codes, whole.quantized.codes)
    assert torch.equal(tiled.sample, whole.sample)
    assert torch.equal(model.tiled_encode(pixels), model.encode(pixels).latents)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(32, 40), (40, 32), (72, 136), (16, 64)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_tiles_are_cut_and_joined_where_they_belong(make_vision_tokenizer, patch_size, height, width, overlap):
    model = make_vision_tokenizer(patch_size=patch_size)
    factor = model.spatial_factor
    # In place of encoder and decoder, what gives the same in tiles and as a whole.
    model._encode = lambda x: F.avg_pool2d(x, factor)
    model._decode = lambda h: F.interpolate(h, scale_factor=factor)
    model.enable_tiling(32, overlap)
    pixels = noise(2, 3, height, width)
    latents = model.encode(pixels).latents
    torch.testing.assert_close(latents, F.avg_pool2d(pixels, factor))
    decoded = model.decode(latents, force_not_quantize=True).sample
    torch.testing.assert_close(decoded, F.interpolate(latents, scale_factor=factor))


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
def test_encoder_and_decoder_never_see_more_than_a_tile(make_vision_tokenizer, patch_size):
    model, pixels = make_vision_tokenizer(patch_size=patch_size), noise(1, 3, 68, 132)
    model.enable_tiling(tile_sample_min_size=32)
    encoded, decoded = shapes_seen(model.encoder), shapes_seen(model.decoder)
    output = model(pixels)
    assert output.sample.shape == pixels.shape
    # A stride of 24 pixels: 3 x 6 tiles, all of full size.
    assert {shape[-2:] for shape in encoded} == {(32 // patch_size, 32 // patch_size)}
    assert {shape[-2:] for shape in decoded} == {(32 // model.spatial_factor, 32 // model.spatial_factor)}
    assert len(encoded) == len(decoded) == 18


@torch.no_grad()
def test_seams_of_a_smooth_image_are_blended_away(make_local_tokenizer):
    model, pixels = make_local_tokenizer(), smooth_image(160, 200)
    latents = model.encode(pixels).latents
    decoded = model.decode(latents, force_not_quantize=True).sample

    def largest_differences(overlap):
        model.enable_tiling(64, overlap)
        tiled = model.encode(pixels).latents, model.decode(latents, force_not_quantize=True).sample
        pairs = zip(tiled, (latents, decoded), strict=True)
        return [((ours - whole).abs().max() / (whole.max() - whole.min())).item() for ours, whole in pairs]

    assert max(largest_differences(overlap=0.5)) < 0.03
    assert min(largest_differences(overlap=0.0)) > 0.1


@torch.no_grad()
def test_far_from_seams_tiles_change_nothing(make_local_tokenizer):
    model, pixels = make_local_tokenizer(), smooth_image(96, 96)
    model.enable_tiling(64, 0.25)
    # In codes the first tile is 0 to 16 and shares 8 to 16 with the next; a code depends on those up to 9 away.
    corner = (..., slice(6), slice(6))
    torch.testing.assert_close(model.tiled_encode(pixels)[corner], model._encode(pixels)[corner])


@torch.no_grad()
def test_codes_are_decoded_in_tiles_and_slices_together(make_vision_tokenizer):
    model, codes = make_vision_tokenizer(), torch.arange(2 * 10 * 14).view(2, 10, 14) % 32
    model.enable_tiling(tile_sample_min_size=16)
    tiled = model.decode_codes(codes).sample
    model.enable_slicing()
    seen = shapes_seen(model.decoder)
    torch.testing.assert_close(model.decode_codes(codes).sample, tiled)
    assert tiled.shape == (2, 3, 40, 56)
    assert {shape[0] for shape in seen} == {1}


def test_tiling_is_off_at_first_and_can_be_put_off(make_vision_tokenizer):
    model = make_vision_tokenizer()
    assert not model.use_tiling and not model.use_slicing
    model.enable_tiling(tile_sample_min_size=16, tile_overlap_factor=0.5)
    model.disable_tiling()
    seen = shapes_seen(model.encoder)
    model.encode(noise(1, 3, 32, 32))
    assert [shape[-2:] for shape in seen] == [(16, 16)]
    model.enable_tiling()
    assert (model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor) == (16, 4, 0.5)


def test_gradients_pass_through_tiles(make_vision_tokenizer):
    model, pixels = make_vision_tokenizer(), noise(1, 3, 40, 24).requires_grad_()
    model.enable_tiling(tile_sample_min_size=16)
    model(pixels).sample.square().mean().backward()
    assert (pixels.grad.abs().sum(dim=(0, 1)) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_sample_min_size": 3}, "tile_sample_min_size is 3 pixels; expected at least 4"),
        ({"tile_overlap_factor": 1.0}, "tile_overlap_factor is 1.0; expected .* from 0 to below 1"),
        ({"tile_overlap_factor": -0.1}, "tile_overlap_factor is -0.1"),
    ],
)
def test_tiles_that_cannot_be_are_an_error(make_vision_tokenizer, options, message):
    model = make_vision_tokenizer()
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(**options)
    assert not model.use_tiling


@torch.no_grad()
def test_a_model_with_language_reads_images_that_are_not_square(make_model):
    model, pixels = make_model(), noise(1, 3, 8, 20)
    tokens = torch.tensor([[10, *[model.config.image_token_id] * (2 * 5), 11]])
    output = model(tokens, pixel_values=pixels, return_reconstruction=True)
    assert output.image_hidden_states.shape[:2] == (1, 10)
    assert output.reconstruction.shape == pixels.shape
