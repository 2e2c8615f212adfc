"""Another size for a trained codebook: which codes stay, which are split, and what images notice of it."""

import pytest
import torch

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.train.models.codebook import count_codes, most_used, resize_codebook

CODES = 32


@pytest.fixture(params=[False, True], ids=["plain", "unit sphere"])
def tokenizer(make_vision_tokenizer, request):
    return make_vision_tokenizer(l2_normalize=request.param).eval()


@pytest.fixture
def pixels():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def codes_of(tokenizer: IBQModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tokenizer.quantize(tokenizer.encode(pixels).latents).codes


def table(tokenizer: IBQModel) -> torch.Tensor:
    return tokenizer.quantize.embedding.weight.detach()


def test_the_most_used_codes_come_first_and_the_lower_of_equals():
    assert most_used(torch.tensor([0, 5, 2, 5, 0]), 4).tolist() == [1, 3, 2, 0]


# Smaller


def test_a_smaller_codebook_keeps_the_most_used_codes_in_their_order(tokenizer):
    counts = torch.zeros(CODES, dtype=torch.long)
    counts[[20, 3, 7]] = torch.tensor([9, 1, 4])
    smaller = resize_codebook(tokenizer, 5, counts)
    # Unused codes fill up from the lowest.
    assert torch.equal(table(smaller), table(tokenizer)[[0, 1, 3, 7, 20]])
    assert smaller.config.num_vq_embeddings == 5


def test_images_whose_codes_are_kept_have_the_same_reconstruction(tokenizer, pixels):
    counts = torch.bincount(codes_of(tokenizer, pixels).flatten(), minlength=CODES)
    used = int((counts > 0).sum())
    assert used < CODES, "all codes in use would leave nothing to drop"
    smaller = resize_codebook(tokenizer, used, counts)
    with torch.no_grad():
        assert torch.equal(smaller(pixels).sample, tokenizer(pixels).sample)


# Larger


def test_a_larger_codebook_splits_the_most_used_codes_to_either_side(tokenizer):
    counts = torch.arange(CODES)
    larger, before = table(resize_codebook(tokenizer, CODES + 2, counts)), table(tokenizer)
    assert torch.equal(larger[: CODES - 2], before[:-2])
    pairs = torch.stack([larger[[CODES - 1, CODES - 2]], larger[CODES:]])
    torch.testing.assert_close(pairs.mean(dim=0), before[[CODES - 1, CODES - 2]])
    distances = (pairs - before[[CODES - 1, CODES - 2]]).norm(dim=-1)
    expected = 0.01 * before[[CODES - 1, CODES - 2]].norm(dim=-1)
    torch.testing.assert_close(distances, expected.expand(2, 2), rtol=1e-3, atol=0)


def test_both_codes_of_a_split_win_latents_near_it(make_vision_tokenizer):
    tokenizer = make_vision_tokenizer(num_vq_embeddings=1, vq_embed_dim=64)
    halves = table(resize_codebook(tokenizer, 2, torch.ones(1, dtype=torch.long)))
    latents = table(tokenizer) + 0.1 * torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    share = (latents @ halves.T).argmax(dim=-1).float().mean()
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("size", [CODES + 1, 2 * CODES, 5 * CODES])
def test_in_a_larger_codebook_latents_keep_their_code_or_get_its_descendant(tokenizer, pixels, size):
    before = codes_of(tokenizer, pixels)
    larger = resize_codebook(tokenizer, size, torch.bincount(before.flatten(), minlength=CODES))
    assert larger.config.num_vq_embeddings == len(table(larger)) == len(table(larger).unique(dim=0)) == size
    ancestors = torch.cdist(table(larger), table(tokenizer)).argmin(dim=-1)
    # Of a model that learned nothing some latents lie halfway between codes.
    assert (ancestors[codes_of(larger, pixels)] == before).float().mean() > 0.85


def test_splitting_is_the_same_for_the_same_seed(tokenizer):
    counts = torch.ones(CODES, dtype=torch.long)
    first, again, other = (table(resize_codebook(tokenizer, 40, counts, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [7, 100])
def test_encoder_and_decoder_stay_as_they_are(tokenizer, size):
    resized = resize_codebook(tokenizer, size, torch.ones(CODES, dtype=torch.long)).state_dict()
    for name, value in tokenizer.state_dict().items():
        assert name == "quantize.embedding.weight" or torch.equal(resized[name], value), name


# Counting


def test_codes_are_counted_in_images_from_all_over_the_data(tokenizer, make_items):
    items = make_items(10)
    chosen = [items[index]["pixel_values"] for index in (0, 2, 5, 7)]
    codes = codes_of(tokenizer, torch.cat(chosen).float() / 127.5 - 1)
    counts = count_codes(tokenizer, items, num_images=4, batch_size=3, progress=False)
    assert torch.equal(counts, torch.bincount(codes.flatten(), minlength=CODES))


def test_fewer_data_than_asked_for_are_all_counted(tokenizer, make_items):
    assert count_codes(tokenizer, make_items(3), num_images=100, batch_size=2, progress=False).sum() == 3 * 16
