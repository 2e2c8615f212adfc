"""What holds for every grid of codes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

SIDES = st.integers(1, 12)


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 3),
    rows=SIDES,
    columns=SIDES,
    patch_size=st.sampled_from([1, 2, 4]),
    tile=st.none() | st.integers(1, 8),
    slices=st.booleans(),
)
@torch.no_grad()
def test_codes_of_every_grid_become_images_of_its_size_and_codes_again(
    make_vision_tokenizer, seed, count, rows, columns, patch_size, tile, slices
):
    tokenizer = make_vision_tokenizer(patch_size=patch_size)
    factor = tokenizer.spatial_factor
    if tile is not None:
        tokenizer.enable_tiling(tile_sample_min_size=tile * factor)
    if slices:
        tokenizer.enable_slicing()
    codes = torch.randint(32, (count, rows, columns), generator=torch.Generator().manual_seed(seed))
    images = tokenizer.decode_codes(codes).sample
    assert factor == 2 * patch_size and images.shape == (count, 3, rows * factor, columns * factor)
    assert images.isfinite().all()
    again = tokenizer.encode_codes(images)
    assert again.shape == codes.shape and again.dtype == torch.long
    assert ((again >= 0) & (again < 32)).all()


@given(seed=st.integers(0, 2**32 - 1), rows=SIDES, columns=SIDES)
@torch.no_grad()
def test_codes_that_are_not_there_yet_are_grey_and_the_rest_is_in_range(make_model, seed, rows, columns):
    model, generator = make_model(), torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 32, (2, rows, columns), generator=generator)
    pixels = model.decode_image_tokens(codes)
    assert pixels.shape == (2, 3, 4 * rows, 4 * columns)
    assert pixels.min() >= -1 and pixels.max() <= 1
    blocks = pixels.unflatten(2, (rows, 4)).unflatten(4, (columns, 4))
    is_grey = (blocks == 0).all(dim=(1, 3, 5))
    assert torch.equal(is_grey, codes == -1)
