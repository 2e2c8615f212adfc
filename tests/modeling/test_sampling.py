"""Codes are drawn as often as their probabilities say, from those that the options leave."""

import pytest
import torch

from ett.modeling_ett.sampling_ett import CodeSampler, nucleus_threshold


def sample_codes(scores, generator=None, **options):
    """One code for each row of scores `(n, K)`."""
    return CodeSampler(generator, **options)(scores.unsqueeze(1), 0).squeeze(1)


@pytest.fixture
def scores():
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_sampling_is_the_best_code(scores, options):
    assert torch.equal(sample_codes(scores, **options), scores.argmax(-1))


def test_top_k_draws_the_k_best_and_all_of_them():
    scores = torch.arange(8.0).log().repeat(2000, 1)
    drawn = sample_codes(scores, torch.Generator().manual_seed(0), top_k=3)
    assert drawn.unique().tolist() == [5, 6, 7]
    torch.testing.assert_close(drawn.bincount() / 2000, torch.tensor([0, 0, 0, 0, 0, 5, 6, 7]) / 18, rtol=0, atol=0.04)


@pytest.mark.parametrize(("top_p", "kept"), [(0.49, [3]), (0.51, [2, 3]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_draws_the_smallest_set_that_reaches_it(top_p, kept):
    scores = torch.tensor([0.10, 0.15, 0.25, 0.50]).log().repeat(500, 1)
    assert sample_codes(scores, torch.Generator().manual_seed(0), top_p=top_p).unique().tolist() == kept


def test_the_threshold_of_top_p_is_that_of_sorting():
    probabilities = (3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))).softmax(-1)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        ordered = probabilities.sort(dim=-1, descending=True).values
        number = (ordered.double().cumsum(-1) < top_p).sum(-1, keepdim=True)
        assert torch.equal(nucleus_threshold(probabilities, top_p), ordered.gather(-1, number))


@pytest.mark.parametrize("options", [{}, {"top_k": 10_000}, {"top_p": 0.999_999}, {"temperature": 5.0}], ids=str)
def test_even_scores_are_drawn_evenly(options):
    drawn = sample_codes(torch.zeros(8000, 8), torch.Generator().manual_seed(0), **options)
    torch.testing.assert_close(drawn.bincount(minlength=8) / 8000, torch.full((8,), 1 / 8), rtol=0, atol=0.015)


def test_temperature_divides_scores():
    scores = torch.tensor([0.0, 2.0]).repeat(4000, 1)
    drawn = sample_codes(scores, torch.Generator().manual_seed(0), temperature=2.0)
    assert drawn.float().mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.02)


def test_a_list_of_generators_draws_row_by_row(scores):
    generators = [torch.Generator().manual_seed(seed) for seed in range(64)]
    drawn = sample_codes(scores, generators)
    for row in (0, 17, 63):
        assert sample_codes(scores[row : row + 1], torch.Generator().manual_seed(row)).item() == drawn[row].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares two devices")
def test_a_generator_on_the_cpu_draws_the_same_on_an_accelerator(scores):
    for generator in (lambda: torch.Generator().manual_seed(3), lambda: [torch.Generator().manual_seed(3)] * 64):
        assert torch.equal(sample_codes(scores.cuda(), generator()).cpu(), sample_codes(scores, generator()))
