"""The networks that judge reconstructions: InceptionV3 for rFID, AlexNet and VGG for LPIPS.

- Weights are files in torch's cache, downloaded there where a network is within reach; each is known by its SHA-256.
- Nothing downloaded is unpickled: LPIPS's are read as tensors alone, Inception's only after all of its SHA-256 agrees.
"""

import functools
import hashlib
import http.client
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from pytorch_fid.inception import FID_WEIGHTS_URL, InceptionV3
from torch import nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, squeezenet1_1

from ett.common_ett.files import sha256_of
from ett.common_ett.lpips import VERSION, load_network, random_lpips

CONNECTION_SECONDS = 10


class MissingWeightsError(OSError):
    """Weights that are neither in torch's cache nor within reach, with the file and its place in one sentence."""


@dataclass(frozen=True)
class Weights:
    """A file of weights: where it is to be had, and the first digits of its SHA-256 or all of them."""

    url: str
    sha256: str

    @property
    def path(self) -> Path:
        """Its place in torch's cache."""
        return Path(torch.hub.get_dir(), "checkpoints", self.url.rpartition("/")[2])

    def fetch(self) -> Path:
        """Downloads the file where it is not in its place; with `HF_HUB_OFFLINE=1` it does not try.

        Raises:
            MissingWeightsError: It is out of reach, or another file is in its place.
        """
        if not self.path.is_file():
            try:
                self._download()
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                raise MissingWeightsError(
                    f"Put the file {self.url} at {self.path} (it was not downloaded: {error})."
                ) from error
        actual = sha256_of(self.path)
        if not actual.startswith(self.sha256):
            raise MissingWeightsError(
                f"{self.path} is not the file {self.url}: its SHA-256 starts with {actual[:8]} instead of "
                f"{self.sha256[:8]}, or differs later on; replace it."
            )
        return self.path

    def _download(self):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        urllib.request.urlopen(self.url, timeout=CONNECTION_SECONDS).close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(self.url, str(self.path), hash_prefix=self.sha256)


INCEPTION = Weights(FID_WEIGHTS_URL, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
PERCEPTUAL = {
    "alex": Weights(AlexNet_Weights.IMAGENET1K_V1.url, "7be5be79"),
    "vgg": Weights(VGG16_Weights.IMAGENET1K_V1.url, "397923af"),
}


class InceptionFeatures(nn.Module):
    """Images `(B, 3, H, W)` in `[0, 1]` to InceptionV3's features `(B, 2048)`, as pytorch-fid computes them: resized
    to 299 bilinearly, in floats all the way."""

    num_features = 2048

    def __init__(self):
        super().__init__()
        INCEPTION.fetch()
        self.network = InceptionV3().eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[0].flatten(1)


class RandomSqueezeFeatures(nn.Module):
    """Features `(B, 512)` of images `(B, 3, H, W)` in `[0, 1]`: the mean over positions of SqueezeNet's last layer.

    The weights are random, the same in every run, so that no download is needed. Fréchet distances on these features
    compare tokenizers with each other; they are no rFID.
    """

    num_features = 512
    SEED = 0

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.SEED)
            self.network = squeezenet1_1(weights=None).features.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(2 * images - 1).mean(dim=(2, 3))


def build_lpips(network: str) -> nn.Module:
    """LPIPS (Zhang et al. 2018), version 0.1, of the pretrained network `"alex"` or `"vgg"`.

    Raises:
        MissingWeightsError: See [`Weights.fetch`].
    """
    path = PERCEPTUAL[network].fetch()
    with torch.random.fork_rng(devices=[]):
        distance = random_lpips(network)
    load_network(distance, torch.load(path, map_location="cpu", weights_only=True))
    return distance.eval().requires_grad_(False)


@dataclass
class Judges:
    """The networks that there are, and of the others what to put where.

    Args:
        networks (`nn.ModuleDict`): Of `lpips_alex`, `lpips_vgg` and `rfid` (see [`Measures`]) those there are.
        missing (`dict[str, str]`): A sentence for each of the others.
        settings (`dict[str, Any]`): What the networks are, as far as it moves the numbers.
    """

    networks: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    missing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def build_judges() -> Judges:
    """All networks whose weights can be had."""
    judges = Judges()
    builders = {f"lpips_{name}": functools.partial(build_lpips, name) for name in PERCEPTUAL}
    for name, build in {**builders, "rfid": InceptionFeatures}.items():
        try:
            judges.networks[name] = build()
        except MissingWeightsError as error:
            judges.missing[name] = str(error)
    for name in judges.networks:
        if name == "rfid":
            judges.settings[name] = {
                "network": "InceptionV3 of pytorch-fid, 2048 features, floats in [0, 1] resized to 299 bilinearly",
                "weights": INCEPTION.path.name,
                "sha256": INCEPTION.sha256,
            }
        else:
            weights = PERCEPTUAL[name.removeprefix("lpips_")]
            judges.settings[name] = {"version": VERSION, "weights": weights.path.name}
    return judges


def hash_module(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers with their names, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = [
    "INCEPTION",
    "PERCEPTUAL",
    "InceptionFeatures",
    "Judges",
    "MissingWeightsError",
    "RandomSqueezeFeatures",
    "build_judges",
    "build_lpips",
    "hash_module",
]
