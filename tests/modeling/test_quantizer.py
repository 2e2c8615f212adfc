"""Index backpropagation quantization against its definition, written out densely in double precision."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from ett.modeling_ett import quantizer_ibq
from ett.modeling_ett.quantizer_ibq import IBQQuantizer, assign, index_backpropagation

K, D = 13, 5


def make_quantizer(dtype=torch.float64, **changes) -> IBQQuantizer:
    torch.manual_seed(1)
    return IBQQuantizer(K, D, **changes).to(dtype)


def make_latents(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, D, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def definition(latents, table, l2_normalize=False, logit_scale=1.0, straight_through_weight=0.0):
    """Every tensor of the definition, none left out: one-hots, probabilities, quantized latents, entropies."""
    batch_size, dim, height, width = latents.shape
    z = latents.movedim(1, -1).reshape(-1, dim)
    e = table
    if l2_normalize:
        z = z / z.norm(dim=-1, keepdim=True)
        e = e / e.norm(dim=-1, keepdim=True)
    s = z @ e.T
    p = torch.softmax(logit_scale * s, dim=-1)
    o = F.one_hot(s.argmax(dim=-1), len(e)).to(p)
    z_q = (o - p.detach() + p) @ e
    z_q2 = o @ e
    embeddings = z_q + straight_through_weight * (z - z.detach())
    quantization_loss = (
        ((z_q - z) ** 2).mean() + ((z_q2.detach() - z) ** 2).mean() + 0.25 * ((z_q2 - z.detach()) ** 2).mean()
    )
    q = torch.softmax(s / 0.01, dim=-1)
    sample_entropy = -(q * torch.log_softmax(s / 0.01, dim=-1)).sum(dim=-1).mean()
    average = q.mean(dim=0)
    average_entropy = -(average * torch.log(average + 1e-5)).sum()
    return {
        "codes": s.argmax(dim=-1).view(batch_size, height, width),
        "embeddings": embeddings.view(batch_size, height, width, dim).movedim(-1, 1),
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
    {"straight_through_weight": 0.3},
    {"l2_normalize": True, "straight_through_weight": 0.3},
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens of 13 codes, of 1 token of more than 200; worked on two rows of 13 at a time."""
    monkeypatch.setattr(quantizer_ibq, "BLOCK_ELEMENTS", 16 * K)
    monkeypatch.setattr(quantizer_ibq, "CHUNK_ELEMENTS", 2 * K)
    monkeypatch.setattr(quantizer_ibq, "CODES_A_PRODUCT", 5)


@pytest.mark.parametrize("blocks", ["one block", "several blocks"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "name", ["embeddings", "quantization_loss", "sample_entropy", "average_entropy", "entropy_loss"]
)
def test_values_and_gradients_are_those_of_the_definition(name, settings, blocks, request):
    if blocks == "several blocks":
        request.getfixturevalue("small_blocks")
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


def test_a_straight_through_copy_changes_no_value():
    latents = make_latents(torch.float32).requires_grad_()
    plain, copying = (make_quantizer(torch.float32, straight_through_weight=weight)(latents) for weight in (0.0, 0.3))
    for name in ("embeddings", "codes", "quantization_loss", "entropy_loss"):
        assert torch.equal(getattr(copying, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_scale": 0}, "logit_scale is 0; expected a number above 0"),
        ({"straight_through_weight": -0.1}, r"straight_through_weight is -0\.1; expected 0 or a number above 0"),
    ],
)
def test_a_gradient_path_that_cannot_be_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        make_quantizer(**settings)


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


# Memory-linear, and exact all the same

PEAKS, FLAT = 1.0, 1e-3


def many_codes(scale: float, dtype: torch.dtype) -> tuple[IBQQuantizer, torch.Tensor]:
    """2,000 codes and 24 latents: at their scale they lie upon codes, or, made small, near to none."""
    torch.manual_seed(4)
    quantizer = IBQQuantizer(2000, 64).to(dtype)
    chosen = quantizer.embedding.weight.detach()[torch.randint(2000, (24,))]
    latents = scale * (chosen + 0.5 * torch.randn(24, 64).to(dtype))
    return quantizer, latents.view(2, 3, 4, 64).movedim(-1, 1).contiguous()


def objective(embeddings, quantization_loss, entropy_loss, **others):
    upstream = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (embeddings * upstream.to(embeddings)).sum() + quantization_loss + entropy_loss


def noticed_share(quantizer: IBQQuantizer, latents: torch.Tensor) -> float:
    tokens = latents.movedim(1, -1).flatten(0, -2)
    *_, noticed = index_backpropagation(tokens, quantizer.embedding.weight, 1.0, 0.01)
    return noticed.float().mean().item()


def test_peaked_latents_notice_few_codes_and_flat_ones_all():
    assert noticed_share(*many_codes(PEAKS, torch.float32)) < 0.2
    assert noticed_share(*many_codes(FLAT, torch.float32)) == 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("scale", [PEAKS, 0.2, FLAT], ids=["peaked", "between", "flat"])
def test_gradients_equal_the_definition_however_peaked_the_logits_are(scale, dtype, tolerance):
    quantizer, latents = many_codes(scale, dtype)
    latents.requires_grad_()
    ours = torch.autograd.grad(objective(**quantizer(latents)), (latents, quantizer.embedding.weight))
    exact = latents.detach().double().requires_grad_(), quantizer.embedding.weight.detach().double().requires_grad_()
    theirs = torch.autograd.grad(objective(**definition(*exact)), exact)
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine - right).norm() <= tolerance * right.norm()


def test_without_bfloat16_in_hardware_the_result_is_the_same(monkeypatch):
    quantizer, latents = many_codes(PEAKS, torch.float32)
    expected = quantizer(latents)
    monkeypatch.setattr(quantizer_ibq, "_multiplies_bfloat16", lambda device: False)
    output = quantizer(latents)
    assert torch.equal(output.codes, expected.codes)
    torch.testing.assert_close(output.entropy_loss, expected.entropy_loss)


def test_without_losses_and_gradients_codes_are_the_same():
    quantizer, latents = many_codes(PEAKS, torch.float32)
    with torch.no_grad():
        assert torch.equal(quantizer(latents, return_losses=False).codes, quantizer(latents).codes)


def test_a_latent_that_is_no_number_shows_in_the_losses(small_blocks):
    quantizer, latents = many_codes(PEAKS, torch.float32)
    latents[0, 0, 0, 0] = torch.nan
    output = quantizer(latents)
    assert output.quantization_loss.isnan() and output.entropy_loss.isnan()


def test_no_tensor_of_tokens_by_codes_is_ever_allocated(monkeypatch):
    monkeypatch.setattr(quantizer_ibq, "BLOCK_ELEMENTS", 2**17)
    quantizer, latents = IBQQuantizer(4096, 8), torch.randn(1, 8, 16, 16, requires_grad=True)
    tokens_by_codes = 256 * 4096 * 4

    def largest_allocation(step) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            objective(**step()).backward()
        return max(event.self_cpu_memory_usage for event in profiler.events())

    assert largest_allocation(lambda: definition(latents, quantizer.embedding.weight)) >= tokens_by_codes
    assert largest_allocation(lambda: quantizer(latents)) <= 2**17 * 4


@pytest.mark.parametrize("layout", ["contiguous", "a view of one image"])
def test_the_operators_keep_their_promises_to_autograd_and_to_the_compiler(layout):
    table = make_quantizer().embedding.weight
    tokens = make_latents()[:1].movedim(1, -1).flatten(0, 2)
    tokens = (tokens.contiguous() if layout == "contiguous" else tokens).requires_grad_()
    for operator, arguments in ((index_backpropagation, (tokens, table, 1.0, 0.01)), (assign, (tokens, table))):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_it_compiles_without_a_break_and_gives_the_same():
    quantizer, latents = many_codes(PEAKS, torch.float32)
    latents.requires_grad_()
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(objective(**compiled(latents)), (latents, quantizer.embedding.weight))
    theirs = torch.autograd.grad(objective(**quantizer(latents)), (latents, quantizer.embedding.weight))
    torch.testing.assert_close(ours, theirs)


def test_inference_compiles_without_a_break_and_gives_the_same():
    quantizer, latents = many_codes(PEAKS, torch.float32)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        output, expected = compiled(latents, return_losses=False), quantizer(latents, return_losses=False)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.embeddings, expected.embeddings)


def test_gradient_checkpointing_changes_nothing():
    quantizer, latents = make_quantizer(), make_latents().requires_grad_()

    def step(latents):
        return objective(**quantizer(latents))

    again = torch.autograd.grad(checkpoint(step, latents, use_reentrant=False), latents)
    assert torch.equal(again[0], torch.autograd.grad(step(latents), latents)[0])


def _rank(rank: int, port: int, folder: str, over_ranks: bool):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    quantizer = make_quantizer(entropy_over_ranks=over_ranks)
    wrapped = DistributedDataParallel(quantizer)
    output = wrapped(make_latents()[rank : rank + 1])
    output.average_entropy.backward()
    torch.save([output.average_entropy.detach(), quantizer.embedding.weight.grad], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("over_ranks", [False, True], ids=["each rank's own", "over all ranks"])
def test_average_entropy_of_two_ranks(over_ranks, tmp_path, free_port):
    torch.multiprocessing.spawn(_rank, (free_port, str(tmp_path), over_ranks), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    quantizer, latents = make_quantizer(), make_latents()
    whole, halves = quantizer(latents).average_entropy, [quantizer(half).average_entropy for half in latents.split(1)]
    expected = [whole, whole] if over_ranks else halves
    torch.testing.assert_close([value for value, _ in ranks], [value.detach() for value in expected])
    (gradient,) = torch.autograd.grad(sum(expected) / 2, quantizer.embedding.weight)
    for _, reduced in ranks:
        torch.testing.assert_close(reduced, gradient)
