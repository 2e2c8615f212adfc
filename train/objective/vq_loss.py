"""Equation 1 of the paper: what a reconstruction costs, term by term."""

import torch
from torch import nn

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.modeling_ett.quantizer_ibq import IBQQuantizerOutput

from ..arguments import ETTTrainingArguments
from .adversary import Adversary, adaptive_weight
from .discriminator import PatchDiscriminator
from .perceptual import build_perceptual_loss


class VQLoss:
    """
    `L_rec + L_quant + L_lpips + lambda_G * L_GAN + lambda_E * L_entropy`, each term a mean over the micro-batch's
    images. lambda_G is fixed, or with `adaptive_adversarial_weight` a multiple of what balances the gradients.

    Args:
        tokenizer ([`IBQModel`]): The tokenizer that learns.
        args ([`ETTTrainingArguments`]): Those of the losses' weights, of the perceptual network and of the
            discriminator. Critics whose weight is 0 are not built.
        discriminator ([`PatchDiscriminator`], *optional*): The discriminator to start from, by default a new one.

    Attributes:
        perceptual (`nn.Module`, *optional*): LPIPS, frozen.
        adversary ([`Adversary`], *optional*): The discriminator with its optimizer.
    """

    def __init__(
        self, tokenizer: IBQModel, args: ETTTrainingArguments, discriminator: PatchDiscriminator | None = None
    ):
        self.args, self.tokenizer = args, tokenizer
        self.perceptual: nn.Module | None = None
        self.adversary: Adversary | None = None
        if args.perceptual_weight:
            perceptual = build_perceptual_loss(args.perceptual_network, args.perceptual_pretrained)
            self.perceptual = perceptual.to(args.device)
        if args.adversarial_weight:
            shape = tokenizer.config.out_channels, args.discriminator_width, args.discriminator_layers
            self.adversary = Adversary(discriminator or PatchDiscriminator(*shape), args)

    def __call__(
        self,
        pixels: torch.Tensor,
        reconstruction: torch.Tensor,
        quantized: IBQQuantizerOutput,
        step: int,
        training: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            pixels, reconstruction (`torch.Tensor` of shape `(batch_size, 3, H, W)`): In `[-1, 1]`, float32.
            quantized ([`IBQQuantizerOutput`]): The quantizer's output, with its losses.
            step (`int`): Of training, counted from 0; the adversarial term begins at one.
            training (`bool`): Whether gradients are wanted.

        Returns:
            The loss, of shape `()` with graph, and the figures for the log by name, each of shape `()`.
        """
        args = self.args
        figures = {
            "reconstruction_loss": (pixels - reconstruction).abs().mean(),
            "squared_error_loss": (pixels - reconstruction).square().mean(),
            "quantization_loss": quantized.quantization_loss,
            "entropy_loss": quantized.entropy_loss,
        }
        # A small tokenizer learns colours sooner by the squared error.
        fidelity = figures["reconstruction_loss"] + args.squared_error_weight * figures["squared_error_loss"]
        real, fake = pixels[: args.critics_batch_size], reconstruction[: args.critics_batch_size]
        if self.perceptual is not None:
            figures["perceptual_loss"] = self.perceptual(real, fake).mean()
            fidelity = fidelity + args.perceptual_weight * figures["perceptual_loss"]
        loss = (
            fidelity
            + args.quantization_weight * figures["quantization_loss"]
            + args.entropy_weight * figures["entropy_loss"]
        )
        if self.adversary is not None and self.adversary.counts_at(step):
            figures["adversarial_loss"] = self.adversary.fool(fake, training)
            weight = args.adversarial_weight
            if args.adaptive_adversarial_weight and training:
                last_layer = self.tokenizer.decoder.conv_out
                balance = adaptive_weight(fidelity, figures["adversarial_loss"], last_layer)
                figures["adversarial_balance"] = balance
                weight = weight * balance
            loss = loss + weight * figures["adversarial_loss"]
        return loss, figures | {"vq_loss": loss}


__all__ = ["VQLoss"]
