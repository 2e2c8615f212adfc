"""LPIPS (Zhang et al. 2018), without its own download and without unpickling."""

import warnings
from collections.abc import Mapping

import lpips
import torch

VERSION = "0.1"


def random_lpips(network: str) -> lpips.LPIPS:
    """LPIPS on a network (`"vgg"`, `"alex"` or `"squeeze"`) of random weights, from torch's global generator."""
    with warnings.catch_warnings():
        # lpips asks torchvision for its networks in a way that torchvision deprecates.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net=network, version=VERSION, pnet_rand=True, verbose=False)


def load_network(distance: lpips.LPIPS, state: Mapping[str, torch.Tensor]):
    """Gives the network of `distance` torchvision's weights of an ImageNet classifier."""
    # lpips cuts torchvision's `features` into slices and keeps the numbers of the layers.
    names = distance.net.state_dict()
    distance.net.load_state_dict({name: state[f"features.{name.partition('.')[2]}"] for name in names})


__all__ = ["VERSION", "load_network", "random_lpips"]
