"""A tokenizer that starts as a nearly linear map."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ett.train.models.initialization import start_linear


@pytest.fixture
def tokenizer(make_vision_tokenizer):
    tokenizer = make_vision_tokenizer(block_out_channels=(16, 32))
    start_linear(tokenizer)
    return tokenizer


def test_residual_branches_are_silent_at_first(tokenizer):
    blocks = [module for module in tokenizer.modules() if isinstance(module, ResnetBlock2D)]
    assert blocks
    for block in blocks:
        hidden = torch.randn(2, block.in_channels, 4, 4)
        passed = hidden if block.conv_shortcut is None else block.conv_shortcut(hidden)
        with torch.no_grad():
            assert torch.equal(block(hidden, None), passed)


def test_convolutions_have_no_bias_and_unit_gain(tokenizer):
    silent = {block.conv2 for block in tokenizer.modules() if isinstance(block, ResnetBlock2D)}
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            assert not module.bias.any()
            if module not in silent:
                gain = module.weight.std() * module.weight[0].numel() ** 0.5
                assert gain.item() == pytest.approx(1, rel=0.3)


def test_unit_codes_are_scaled_to_unit_components(make_vision_tokenizer):
    gains = []
    for l2_normalize in (False, True):
        tokenizer = make_vision_tokenizer(l2_normalize=l2_normalize, vq_embed_dim=16)
        torch.manual_seed(0)
        start_linear(tokenizer)
        gains.append(tokenizer.post_quant_conv.weight.detach())
    torch.testing.assert_close(gains[1], 4 * gains[0])
