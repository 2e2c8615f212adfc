"""The losses and the adversary, by hand."""

import math
import pathlib

import pytest
import torch
import torchvision

from ett.common_ett.metrics import codebook_use
from ett.modeling_ett.quantizer_ibq import IBQQuantizerOutput
from ett.train.objective.discriminator import PatchDiscriminator, discriminator_hinge_loss, generator_loss
from ett.train.objective.perceptual import PERCEPTUAL_WEIGHTS, build_perceptual_loss
from ett.train.objective.vq_loss import VQLoss


def test_the_discriminator_is_the_papers():
    discriminator = PatchDiscriminator(3, 64, 3)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    with torch.no_grad():
        assert tuple(discriminator(torch.zeros(1, 3, 256, 256)).shape) == (1, 1, 30, 30)


def test_the_discriminator_starts_as_its_reference_does():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 64, 3)
    norms = [module for module in discriminator.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert discriminator.main[8].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert norms[-1].weight.mean().item() == pytest.approx(1, abs=0.01)
    assert norms[-1].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(not norm.bias.any() for norm in norms)


def test_the_hinge_loss_is_half_the_sum_of_both_sides():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5, 0.0])
    assert discriminator_hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) + (0 + 1.5 + 1)) / 3)


def test_the_generators_loss_is_non_saturating_on_each_images_mean():
    logits = torch.tensor([[1.0, -1.0], [0.0, 2 * math.log(3)]]).view(2, 1, 1, 2)
    assert generator_loss(logits).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_lecam_compares_with_running_means_that_it_first_updates():
    discriminator = PatchDiscriminator(3, 8, 1, lecam_decay=0.9)
    real, fake = torch.tensor([0.5, 1.5]), torch.tensor([-2.0, 0.0])
    first = discriminator.lecam_regularization(real, fake)
    assert discriminator.lecam_real.item() == pytest.approx(0.1)
    assert discriminator.lecam_fake.item() == pytest.approx(-0.1)
    assert first.item() == pytest.approx((0.6**2 + 1.6**2) / 2 + (2.1**2 + 0.1**2) / 2)
    discriminator.start_lecam_step()
    discriminator.lecam_regularization(real, fake)
    assert discriminator.lecam_real.item() == pytest.approx(0.19)


def test_lecams_running_means_move_once_a_step_by_the_mean_of_its_micro_batches():
    """Each micro-batch compares with the means of the step so far: 0.1 x 1, then 0.1 x (0.75 x 1 + 0.25 x 5)."""
    discriminator = PatchDiscriminator(3, 8, 1, lecam_decay=0.9)
    zeros = torch.zeros(2)
    first = discriminator.lecam_regularization(torch.ones(6), zeros, 0.75)
    assert first.item() == pytest.approx(1.0 + 0.1**2)
    second = discriminator.lecam_regularization(torch.full((2,), 5.0), zeros, 0.25)
    assert second.item() == pytest.approx(5.0**2 + 0.2**2)
    assert discriminator.lecam_real.item() == pytest.approx(0.2)
    discriminator.start_lecam_step()
    discriminator.lecam_regularization(torch.ones(2), zeros)
    assert discriminator.lecam_real.item() == pytest.approx(0.9 * 0.2 + 0.1)


def test_lecams_running_means_are_saved_with_the_weights():
    discriminator = PatchDiscriminator(3, 8, 1)
    discriminator.lecam_regularization(torch.ones(2), -torch.ones(2))
    other = PatchDiscriminator(3, 8, 1)
    other.load_state_dict(discriminator.state_dict())
    assert other.lecam_real.item() == pytest.approx(0.001)
    assert other.lecam_fake.item() == pytest.approx(-0.001)


def test_lecams_running_means_take_no_gradient():
    discriminator = PatchDiscriminator(3, 8, 1)
    real = torch.ones(2, requires_grad=True)
    discriminator.lecam_regularization(real, -real).backward()
    assert not discriminator.lecam_real.requires_grad
    torch.testing.assert_close(real.grad, 2 * (real.detach() + 0.001))


def test_a_random_perceptual_network_is_the_same_in_every_run_and_leaves_the_random_state():
    images = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    values, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        values.append(build_perceptual_loss("squeeze", pretrained=False)(*images).item())
        states.append(torch.equal(torch.random.get_rng_state(), before))
    assert values[0] == values[1] != 0
    assert states == [True, True]


@pytest.mark.parametrize("network", ["alex", "squeeze"])
def test_pretrained_weights_come_from_torchvisions_file_in_its_cache(network, tmp_path, monkeypatch):
    builders = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}
    features = builders[network]().features
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / PERCEPTUAL_WEIGHTS[network].url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    first = build_perceptual_loss(network, pretrained=True).net.slice1[0]
    assert torch.equal(first.weight, features[0].weight)


def test_a_file_of_weights_that_holds_other_objects_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / PERCEPTUAL_WEIGHTS["squeeze"].url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(pathlib.Path("object"), file)
    with pytest.raises(OSError, match="squeeze network of the perceptual loss could not be loaded"):
        build_perceptual_loss("squeeze", pretrained=True)


def test_the_perceptual_network_is_frozen_and_passes_gradients_on():
    perceptual = build_perceptual_loss("squeeze", pretrained=False)
    assert not any(module.training for module in perceptual.modules())
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    reconstruction = torch.zeros(1, 3, 64, 64, requires_grad=True)
    perceptual(torch.ones(1, 3, 64, 64), reconstruction).sum().backward()
    assert reconstruction.grad.abs().sum() > 0


def test_the_terms_of_a_reconstruction_are_given_unweighted_and_added_by_their_weights(
    make_vision_tokenizer, arguments
):
    args = arguments(quantization_weight=0.5, entropy_weight=0.1, squared_error_weight=2.0, adversarial_weight=0.0)
    pixels, reconstruction = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.25)
    quantized = IBQQuantizerOutput(
        embeddings=None, codes=None, quantization_loss=torch.tensor(2.0), entropy_loss=torch.tensor(-3.0)
    )
    loss, figures = VQLoss(make_vision_tokenizer(), args)(pixels, reconstruction, quantized, step=0)
    assert {name: value.item() for name, value in figures.items()} == {
        "reconstruction_loss": 0.25,
        "squared_error_loss": 0.0625,
        "quantization_loss": 2.0,
        "entropy_loss": -3.0,
        "vq_loss": loss.item(),
    }
    assert loss.item() == pytest.approx(0.25 + 2 * 0.0625 + 0.5 * 2.0 - 0.1 * 3.0)


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity"), [([3, 3, 0, 0], 0.5, 2.0), ([5, 5, 5, 5], 1.0, 4.0), ([7, 0, 0, 0], 0.25, 1.0)]
)
def test_use_of_the_codebook(counts, usage, perplexity):
    assert codebook_use(torch.tensor(counts)) == (usage, pytest.approx(perplexity))
