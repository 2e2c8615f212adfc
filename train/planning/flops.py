"""Model FLOPs: what a step of training has to compute, whatever it computes again or pads.

A product of matrices `(n, a)` and `(a, b)` counts `2 n a b`. The *passes* of a weight are the forward pass, the
gradient's way back through it, and where it learns, the gradient of the weight itself: 2 or 3 in the language model.

- Language model: `2 x weights x positions x passes` for its linear layers; for attention, with a forward pass and two
  for its gradients, `3 x 4 x layers x heads x width of a head` for each pair of a position and one that it sees.
  Heads count for the labelled positions alone.
- Projector: `2 x weights x codes x passes`; back through its first layer the gradient goes to a tokenizer that learns.
  An index model has none, and looking up an embedding is no product.
- Tokenizer: convolutions and attention as torch counts them, of the encoder alone (one pass) when it is frozen, else
  of encoder and decoder (three). The quantizer's products count `2 K D` for a code: one when frozen, else two of
  three passes, since index backpropagation adds the soft assignment.
- Critics: LPIPS has two forward passes and one back; the discriminator six for its own step and two for the
  tokenizer's.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
}
"""Dense products of bfloat16 matrices, in FLOP/s, by words in a device's name: their makers' figures."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a known GPU, from its name; none for other devices."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the GPU of that name, such as "NVIDIA A100-SXM4-80GB".

    >>> peak_of("NVIDIA H100 PCIe") == 756e12
    True
    """
    words = name.replace("-", " ").split()
    known = [entry for entry in PEAK_FLOPS if set(entry.split()) <= set(words) and "Laptop" not in words]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class StepFlops:
    """Model FLOPs of what a batch holds, as described above.

    Args:
        model: Its `requires_grad` tell what learns.
        perceptual, discriminator: The critics, as far as there are such.

    Attributes:
        of_position, of_pair, of_code, of_label, of_code_label (`float`): FLOPs of a position of the language model, of
            a position and one that it sees, of an image's code in the projector, of a label, of a code as a label.
    """

    def __init__(
        self,
        model: IBQModel | ETTForConditionalGeneration,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
    ):
        is_tokenizer = isinstance(model, IBQModel)
        self.tokenizer = model if is_tokenizer else model.model.vision_tokenizer
        self.tokenizer_learns = any(parameter.requires_grad for parameter in self.tokenizer.parameters())
        self.perceptual, self.discriminator = perceptual, discriminator
        self.of_image, self.of_judged_image = map(functools.cache, (self._of_image, self._of_judged_image))
        self.of_position = self.of_pair = self.of_code = self.of_label = self.of_code_label = 0.0
        if is_tokenizer:
            return
        text = model.config.text_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.of_position = _of_layers(model.model.language_model, passes=2)
        self.of_pair = 12.0 * text.num_hidden_layers * text.num_attention_heads * head_width
        if model.config.visual_embedding == "codebook":
            self.of_code = _of_layers(model.model.projector, passes=2)
            if not self.tokenizer_learns:
                self.of_code -= 2.0 * model.model.projector.linear_1.weight.numel()
        self.of_label = _of_layers(model.lm_head, passes=2)
        if model.config.visual_head:
            self.of_code_label = _of_layers(model.visual_head, passes=2)

    def _of_image(self, height: int, width: int) -> float:
        """FLOPs of the tokenizer for an image of that many pixels."""
        config = self.tokenizer.config
        rows, columns = (side // self.tokenizer.spatial_factor for side in (height, width))
        with torch.device("meta"):
            # The codebook's size does not matter to the layers around it.
            tokenizer = IBQModel.from_config({**config, "num_vq_embeddings": 2})
            pixels = torch.empty(1, config.in_channels, height, width)
            embeddings = torch.empty(1, config.vq_embed_dim, rows, columns)
        product = 2.0 * rows * columns * config.num_vq_embeddings * config.vq_embed_dim
        encoder = _counted(tokenizer.encode, pixels)
        if not self.tokenizer_learns:
            return encoder + product
        return 3 * (encoder + _counted(tokenizer.decode, embeddings, True)) + 6 * product

    def _of_judged_image(self, height: int, width: int) -> float:
        """FLOPs of the critics for an image of that many pixels and its reconstruction."""
        pixels = torch.empty(1, self.tokenizer.config.out_channels, height, width, device="meta")
        total = 0.0
        if self.perceptual is not None:
            total += 1.5 * _counted(copy.deepcopy(self.perceptual).to("meta"), pixels, pixels)
        if self.discriminator is not None:
            total += 8 * _counted(copy.deepcopy(self.discriminator).to("meta").eval(), pixels)
        return total


def _of_layers(module: nn.Module, passes: int) -> float:
    """FLOPs of a module's linear layers for one position."""
    return sum(
        2.0 * layer.in_features * layer.out_features * (passes + layer.weight.requires_grad)
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    )


def _counted(run: Callable, *inputs: Any) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return float(counter.get_total_flops())


__all__ = ["PEAK_FLOPS", "StepFlops", "peak_flops", "peak_of"]
