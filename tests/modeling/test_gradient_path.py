"""Measures of the gradient's path through the quantizer: against the dense definition, and where they are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from ett.modeling_ett import quantizer_ibq
from ett.modeling_ett.gradient_path import GradientPath, measure_gradient_path
from ett.modeling_ett.quantizer_ibq import IBQQuantizer

K = D = 16


def make_latents(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, D, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def make_quantizer(dtype=torch.float64, **changes) -> IBQQuantizer:
    torch.manual_seed(0)
    return IBQQuantizer(K, D, **changes).to(dtype)


def isolated(length: float, **changes) -> tuple[IBQQuantizer, torch.Tensor]:
    """A codebook of orthogonal codes of one length, and every code once as a latent."""
    quantizer = IBQQuantizer(K, D, **changes).double()
    quantizer.embedding.weight.data = length * torch.eye(K, dtype=torch.float64)
    return quantizer, quantizer.embedding.weight.detach().view(1, 4, 4, D).movedim(-1, 1)


def summary(quantizer, latents):
    return {name: value.item() for name, value in measure_gradient_path(quantizer, latents).summary().items()}


SETTINGS = [{}, {"logit_scale": 0.2}, {"straight_through_weight": 0.3}, {"l2_normalize": True, "logit_scale": 7.0}]


@pytest.mark.parametrize("blocks", ["one block", "several blocks"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_measures_are_those_of_the_dense_definition(settings, blocks, monkeypatch):
    if blocks == "several blocks":
        monkeypatch.setattr(quantizer_ibq, "BLOCK_ELEMENTS", 5 * K)
    quantizer, latents = make_quantizer(**settings), make_latents().requires_grad_()
    z, codes = latents.movedim(1, -1).flatten(0, 2), quantizer.embedding.weight.detach()
    if quantizer.l2_normalize:
        z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
    p = torch.softmax(quantizer.logit_scale * z @ codes.T, dim=-1)
    embeddings = p @ codes + quantizer.straight_through_weight * z
    upstream = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [
        torch.autograd.grad(output, latents, upstream.movedim(1, -1).flatten(0, 2), retain_graph=True)[0]
        for output in (embeddings, z)
    ]
    passed, copied = (gradient.movedim(1, -1).flatten(0, 2).norm(dim=-1) for gradient in gradients)
    expected = GradientPath(passed, copied, p.detach().amax(dim=-1))
    torch.testing.assert_close(tuple(measure_gradient_path(quantizer, latents)), tuple(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1.0, 2.0, 6.0])
def test_the_largest_probability_of_isolated_codes_is_known(length):
    expected = 1 / (1 + (K - 1) * math.exp(-(length**2)))
    assert summary(*isolated(length))["largest_probability"] == pytest.approx(expected, rel=1e-12)


def test_the_path_to_latents_between_codes_is_open_and_to_those_on_isolated_codes_closed():
    between = summary(make_quantizer(), 0.1 * make_latents())
    assert 0.5 < between["ratio"] < 5 and between["dead_tokens"] == 0
    near = summary(*isolated(2.0))
    assert 0.01 < near["ratio"] < 0.5 and near["dead_tokens"] == 0
    far = summary(*isolated(6.0))
    assert far["ratio"] < 1e-7 and far["dead_tokens"] == 1 and far["largest_probability"] > 0.999


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_a_straight_through_copy_opens_a_closed_path_by_its_weight(l2_normalize):
    settings = {"l2_normalize": l2_normalize, "logit_scale": 100.0 if l2_normalize else 1.0}
    closed, latents = isolated(6.0, **settings)
    assert summary(closed, latents)["ratio"] < 1e-7
    copying, _ = isolated(6.0, **settings, straight_through_weight=0.25)
    assert summary(copying, latents)["ratio"] == pytest.approx(0.25)


def test_a_lower_logit_scale_opens_a_closed_path():
    assert summary(*isolated(6.0, logit_scale=0.1))["ratio"] > 0.1


def test_the_dead_tokens_are_those_whose_own_gradient_is_lost():
    path = GradientPath(torch.tensor([2.0, 1e-4, 0.9e-3]), torch.ones(3), torch.ones(3))
    assert path.summary()["dead_tokens"].item() == pytest.approx(2 / 3)
    assert path.summary()["ratio"].item() == pytest.approx(2 / math.sqrt(3), rel=1e-6)


def test_batches_join_to_one():
    path = GradientPath(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.5]))
    other = GradientPath(torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([0.7]))
    assert [value.tolist() for value in GradientPath.join([path, other])] == [
        [1, 3],
        [2, 4],
        pytest.approx([0.5, 0.7]),
    ]


def test_measuring_leaves_gradients_and_random_numbers_alone():
    quantizer, latents = make_quantizer(), make_latents().requires_grad_()
    state = torch.get_rng_state()
    with torch.inference_mode():
        measure_gradient_path(quantizer, latents)
    assert torch.equal(torch.get_rng_state(), state)
    assert quantizer.embedding.weight.grad is None and latents.grad is None


def test_latents_in_half_precision_are_measured_in_single():
    quantizer, latents = make_quantizer(torch.float32), make_latents(torch.bfloat16)
    half, single = (measure_gradient_path(quantizer, values) for values in (latents, latents.float()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(half, single, strict=True))
