"""How a tokenizer that is trained from nothing starts."""

import math

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ett.modeling_ett.modeling_ibq import IBQModel


@torch.no_grad()
def start_linear(tokenizer: IBQModel):
    """Makes a new tokenizer a nearly linear map: no biases, unit gain, residual branches that end in zeros.

    Tints and colours then pass from the first step on, instead of emerging after some hundred.
    """
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            nn.init.zeros_(module.bias)
    for module in tokenizer.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    if tokenizer.config.l2_normalize:
        # Components of unit vectors are about 1/sqrt(D).
        tokenizer.post_quant_conv.weight.mul_(math.sqrt(tokenizer.config.vq_embed_dim))


__all__ = ["start_linear"]
