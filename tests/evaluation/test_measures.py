"""The running measures against direct computation, and the networks that judge."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from pytorch_fid import inception
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import alexnet

from ett.common_ett.files import sha256_of
from ett.evaluation_ett import networks
from ett.evaluation_ett.measures import Measures
from ett.evaluation_ett.networks import (
    InceptionFeatures,
    MissingWeightsError,
    Weights,
    build_judges,
    build_lpips,
)


class ColourFeatures(nn.Module):
    """Stands in for Inception: six features of an image, in floats."""

    num_features = 6

    def forward(self, images):
        return torch.cat([images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))], dim=1)


@pytest.fixture
def pairs():
    """Originals of 8 bits and noisy reconstructions, each `(12, 3, 32, 32)` in [-1, 1], and their codes."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (12, 3, 32, 32), generator=generator) / 127.5 - 1
    noise = torch.rand(12, 3, 32, 32, generator=generator) * torch.linspace(0.1, 1, 12)[:, None, None, None]
    return originals, (originals + noise).clamp(-1, 1), torch.randint(0, 5, (12, 2, 2), generator=generator)


def measured(pairs, batch_size=5, **options):
    measures = Measures(8, **options)
    for batch in zip(*(tensor.split(batch_size) for tensor in pairs), strict=True):
        measures.add(*batch)
    return measures


def as_levels(pixels):
    """What a conversion to uint8 makes of pixels, by numpy in double precision."""
    return np.floor((pixels.double().numpy() + 1) * 127.5 + 1e-3)


def test_psnr_is_the_mean_over_images_truncated_to_8_bits(pairs):
    originals, reconstructions = map(as_levels, pairs[:2])
    errors = np.square(originals - reconstructions).mean(axis=(1, 2, 3))
    expected = np.mean([10 * math.log10(255**2 / error) for error in errors])
    assert measured(pairs, truncate=True).results()["psnr"] == pytest.approx(expected, abs=1e-4)


def test_without_truncation_psnr_is_that_of_the_floats(pairs):
    errors = ((pairs[0] - pairs[1]) / 2).square().mean(dim=(1, 2, 3))
    assert measured(pairs).results()["psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-4)


def test_ssim_is_the_mean_over_images_truncated_to_8_bits(pairs):
    levels = [torch.from_numpy(as_levels(pixels)) for pixels in pairs[:2]]
    expected = [
        structural_similarity_index_measure(second[None], first[None], data_range=255.0).item()
        for first, second in zip(*levels, strict=True)
    ]
    assert measured(pairs, truncate=True).results()["ssim"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_judges_distance_is_the_mean_over_images(pairs):
    class Distance(nn.Module):
        def forward(self, first, second):
            return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)

    results = measured(pairs, judges=nn.ModuleDict({"lpips_alex": Distance()})).results()
    assert results["lpips_alex"] == pytest.approx((pairs[0] - pairs[1]).abs().mean().item(), rel=1e-6)


def test_rfid_is_the_frechet_distance_between_the_features(pairs):
    first, second = (ColourFeatures()((pixels + 1) / 2).double().numpy() for pixels in pairs[:2])
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    expected = means + np.trace(covariances[0] + covariances[1] - 2 * root)
    results = measured(pairs, judges=nn.ModuleDict({"rfid": ColourFeatures()})).results()
    assert results["rfid"] == pytest.approx(expected, rel=1e-4)


def test_the_features_see_floats_and_not_8_bits(pairs):
    originals, reconstructions = torch.zeros(4, 3, 32, 32), torch.full((4, 3, 32, 32), 1e-3)
    codes = torch.zeros(4, 1, 1, dtype=torch.long)
    results = measured((originals, reconstructions, codes), judges=nn.ModuleDict({"rfid": ColourFeatures()})).results()
    assert results["rfid"] > 0


def test_one_image_has_no_rfid(pairs):
    one = [tensor[:1] for tensor in pairs]
    assert measured(one, judges=nn.ModuleDict({"rfid": ColourFeatures()})).results()["rfid"] is None


def test_going_on_from_a_state_gives_exactly_the_same(pairs):
    judges = nn.ModuleDict({"rfid": ColourFeatures()})
    whole = measured(pairs, batch_size=4, judges=judges).results()
    state = measured([tensor[:4] for tensor in pairs], judges=judges).state()
    resumed = Measures(8, judges=judges)
    resumed.load_state(state)
    for start in (4, 8):
        resumed.add(*(tensor[start : start + 4] for tensor in pairs))
    assert resumed.results() == whole


def test_a_state_is_as_large_after_many_images_as_after_few(pairs):
    def size(measures):
        return {name: tensor.shape for name, tensor in measures.state().items()}

    judges = nn.ModuleDict({"rfid": ColourFeatures()})
    assert size(measured([tensor[:1] for tensor in pairs], judges=judges)) == size(measured(pairs, judges=judges))


# Weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty place for torch's weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def place(weights, state):
    """Saves a state where a file of weights belongs, and gives the weights with its SHA-256."""
    torch.save(state, weights.path)
    return Weights(weights.url, sha256_of(weights.path))


def test_missing_weights_are_named_with_their_file_and_place(cache):
    judges = build_judges()
    assert not judges.networks and set(judges.missing) == {"rfid", "lpips_alex", "lpips_vgg"}
    assert judges.missing["rfid"] == (
        "Put the file https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        f"pt_inception-2015-12-05-6726825d.pth at {cache}/pt_inception-2015-12-05-6726825d.pth "
        "(it was not downloaded: HF_HUB_OFFLINE is set)."
    )
    assert f"alexnet-owt-7be5be79.pth at {cache}/alexnet-owt-7be5be79.pth" in judges.missing["lpips_alex"]


def test_another_file_in_the_weights_place_is_not_loaded(cache, monkeypatch):
    (cache / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"pickled")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(MissingWeightsError, match=r"is not the file .* SHA-256 starts with"):
        InceptionFeatures()


def test_lpips_is_made_of_the_weights_in_the_cache(cache, monkeypatch):
    torch.manual_seed(0)
    network = alexnet(weights=None)
    weights = place(networks.PERCEPTUAL["alex"], network.state_dict())
    monkeypatch.setitem(networks.PERCEPTUAL, "alex", weights)
    distance = build_lpips("alex")
    assert torch.equal(distance.net.slice5[-2].weight, network.features[10].weight)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert distance(images, images).flatten().tolist() == [0, 0]
    assert (distance(images, images.flip(0)) > 0).all()
    assert set(build_judges().networks) == {"lpips_alex"}


def test_inception_takes_floats_of_any_size_and_gives_2048_features(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        network = inception.fid_inception_v3()
    monkeypatch.setattr(networks, "INCEPTION", place(networks.INCEPTION, network.state_dict()))
    features = build_judges().networks["rfid"]
    images = torch.rand(2, 3, 32, 48)
    with torch.inference_mode():
        assert features(images).shape == (2, 2048)
        assert not torch.equal(features(images), features(images + 1e-3))
