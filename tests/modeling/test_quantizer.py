"""Index backpropagation quantization against its definition, written out densely in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_ett.quantizer_ibq import IBQQuantizer

K, D = 13, 5


def make_quantizer(dtype=torch.float64, **changes) -> IBQQuantizer:
    torch.manual_seed(1)
    return IBQQuantizer(K, D, **changes).to(dtype)


def make_latents(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, D, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def definition(latents, table, l2_normalize=False, logit_scale=1.0):
    """Every tensor of the definition, none left out: one-hots, probabilities, quantized latents, entropies."""
    z = latents.movedim(1, -1).reshape(-1, D)
    e = table
    if l2_normalize:
        z = z / z.norm(dim=-1, keepdim=True)
        e = e / e.norm(dim=-1, keepdim=True)
    s = z @ e.T
    p = torch.softmax(logit_scale * s, dim=-1)
    o = F.one_hot(s.argmax(dim=-1), K).to(p)
    z_q = (o - p.detach() + p) @ e
    z_q2 = o @ e
    quantization_loss = (
        ((z_q - z) ** 2).mean() + ((z_q2.detach() - z) ** 2).mean() + 0.25 * ((z_q2 - z.detach()) ** 2).mean()
    )
    q = torch.softmax(s / 0.01, dim=-1)
    sample_entropy = -(q * torch.log_softmax(s / 0.01, dim=-1)).sum(dim=-1).mean()
    average = q.mean(dim=0)
    average_entropy = -(average * torch.log(average + 1e-5)).sum()
    return {
        "codes": s.argmax(dim=-1).view(2, 3, 4),
        "embeddings": z_q.view(2, 3, 4, D).movedim(-1, 1),
        "quantization_loss": quantization_loss,
        "sample_entropy": sample_entropy,
        "average_entropy": average_entropy,
        "entropy_loss": sample_entropy - average_entropy,
        "squared_error": ((z_q2 - z) ** 2).mean(),
    }


SETTINGS = [
    {},
    {"l2_normalize": True},
    {"l2_normalize": True, "logit_scale": 7.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "name", ["embeddings", "quantization_loss", "sample_entropy", "average_entropy", "entropy_loss"]
)
def test_values_and_gradients_are_those_of_the_definition(name, settings):
    quantizer, latents = make_quantizer(**settings), make_latents().requires_grad_()
    table = quantizer.embedding.weight.detach().clone().requires_grad_()
    ours = getattr(quantizer(latents), name)
    theirs = definition(latents, table, **settings)[name]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = torch.autograd.grad(ours, (latents, quantizer.embedding.weight), upstream)
    theirs = torch.autograd.grad(theirs, (latents, table), upstream)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_codes_are_those_of_the_definition(settings):
    quantizer, latents = make_quantizer(**settings), make_latents()
    expected = definition(latents, quantizer.embedding.weight, **settings)["codes"]
    assert torch.equal(quantizer(latents).codes, expected)


def test_a_code_is_the_largest_dot_product_and_not_the_nearest_row():
    quantizer = IBQQuantizer(2, 2)
    quantizer.embedding.weight.data = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    latents = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert quantizer(latents).codes.item() == 1


def test_on_the_unit_sphere_length_does_not_count():
    quantizer = IBQQuantizer(2, 2, l2_normalize=True)
    quantizer.embedding.weight.data = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    output = quantizer(torch.tensor([0.1, 0.0]).view(1, 2, 1, 1))
    assert output.codes.item() == 0
    assert output.embeddings.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_forward_value_is_the_chosen_row(settings):
    quantizer, latents = make_quantizer(torch.float32, **settings), make_latents(torch.float32).requires_grad_()
    output = quantizer(latents)
    torch.testing.assert_close(output.embeddings, quantizer.lookup(output.codes), rtol=0, atol=1e-6)


def test_without_gradients_the_forward_value_is_the_chosen_row_to_the_last_bit():
    quantizer, latents = make_quantizer(torch.float32), make_latents(torch.float32)
    with torch.no_grad():
        output = quantizer(latents)
    assert torch.equal(output.embeddings, quantizer.embedding.weight[output.codes].movedim(-1, 1))


def test_the_quantization_loss_is_two_and_a_quarter_times_the_squared_error():
    quantizer, latents = make_quantizer(), make_latents()
    error = definition(latents, quantizer.embedding.weight)["squared_error"]
    assert quantizer(latents).quantization_loss.item() == pytest.approx(2.25 * error.item(), rel=1e-12)


def test_every_row_of_the_codebook_gets_a_gradient_from_the_embeddings():
    quantizer, latents = make_quantizer(), make_latents()
    output = quantizer(latents)
    assert output.codes.unique().numel() < K
    output.embeddings.square().sum().backward()
    assert bool((quantizer.embedding.weight.grad.abs().sum(dim=1) > 0).all())


def test_the_gradient_reaches_the_latents_through_the_softmax_alone():
    """A gradient copied from embeddings to latents would equal the upstream gradient; this one does not."""
    quantizer, latents = make_quantizer(), make_latents().requires_grad_()
    upstream = torch.ones(2, D, 3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(quantizer(latents).embeddings, latents, upstream)
    p = torch.softmax(latents.movedim(1, -1) @ quantizer.embedding.weight.T, dim=-1)
    a = quantizer.embedding.weight.sum(dim=-1)
    expected = (p * (a - (p * a).sum(dim=-1, keepdim=True))) @ quantizer.embedding.weight
    torch.testing.assert_close(gradient.movedim(1, -1), expected, rtol=0, atol=1e-12)


def test_the_average_entropy_of_even_use_falls_short_of_log_k_by_the_epsilon():
    quantizer = IBQQuantizer(4, 4).double()
    quantizer.embedding.weight.data = torch.eye(4, dtype=torch.float64)
    output = quantizer(torch.eye(4, dtype=torch.float64).view(1, 4, 2, 2))
    assert output.average_entropy.item() == pytest.approx(-math.log(0.25 + 1e-5), abs=1e-12)
    assert output.sample_entropy.item() == pytest.approx(0, abs=1e-12)


def test_no_losses_unless_they_are_asked_for():
    output = make_quantizer()(make_latents(), return_losses=False)
    assert set(output.keys()) == {"embeddings", "codes"}
    assert output.quantization_loss is None and output.entropy_loss is None


def test_under_autocast_codes_are_computed_in_single_precision():
    torch.manual_seed(0)
    quantizer, latents = IBQQuantizer(500, D), torch.randn(4, D, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(latents)
        flipped = (latents.movedim(1, -1) @ quantizer.embedding.weight.T).argmax(-1) != output.codes
    expected = quantizer(latents)
    assert torch.equal(output.codes, expected.codes)
    assert bool(flipped.any()), "bf16 must make a difference, or this test shows nothing"
    assert output.embeddings.dtype == torch.float32
    assert torch.equal(output.entropy_loss, expected.entropy_loss)


def test_embeddings_have_the_dtype_of_the_latents_and_losses_are_in_single_precision():
    quantizer, latents = make_quantizer(torch.float32), make_latents(torch.bfloat16)
    output = quantizer(latents)
    assert output.embeddings.dtype == torch.bfloat16
    assert output.quantization_loss.dtype == output.entropy_loss.dtype == torch.float32
    assert torch.equal(output.codes, quantizer(latents.float()).codes)
