"""The perceptual loss: LPIPS, whose networks are read without unpickling."""

import logging
import pickle

import torch
from torch import nn
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from ett.common_ett.lpips import load_network, random_lpips

logger = logging.getLogger(__name__)

PERCEPTUAL_SEED = 0
PERCEPTUAL_WEIGHTS = {
    "vgg": VGG16_Weights.IMAGENET1K_V1,
    "alex": AlexNet_Weights.IMAGENET1K_V1,
    "squeeze": SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


def build_perceptual_loss(network: str, pretrained: bool) -> nn.Module:
    """LPIPS (Zhang et al. 2018), frozen.

    Args:
        network (`"vgg"`, `"alex"` or `"squeeze"`): The network whose features are compared.
        pretrained (`bool`): Use ImageNet weights, which torchvision downloads once. Otherwise the network's weights
            are random, the same in every run.

    Raises:
        OSError: The pretrained weights are neither cached nor within reach, or their file holds something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PERCEPTUAL_SEED)
        loss = random_lpips(network)
    if not pretrained:
        logger.warning(
            "The perceptual loss compares features of a random %s network (perceptual_pretrained=false).", network
        )
        return loss.eval().requires_grad_(False)
    try:
        # lpips itself would unpickle whatever the file holds.
        state = PERCEPTUAL_WEIGHTS[network].get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise OSError(
            f"The pretrained {network} network of the perceptual loss could not be loaded ({error}). Run once "
            "with a network connection, put torchvision's weights into its cache, or set "
            "perceptual_pretrained=false to compare random features instead."
        ) from error
    load_network(loss, state)
    return loss.eval().requires_grad_(False)


__all__ = ["build_perceptual_loss"]
