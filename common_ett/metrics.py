"""Metrics of reconstructions and of codebooks."""

import torch

PEAK_PSNR = 100.0
"""PSNR of a perfect reconstruction, in dB, in the place of infinity."""


def psnr_of(squared_error: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """
    PSNR in dB, at most [`PEAK_PSNR`].

    Args:
        squared_error (`torch.Tensor`): Mean squared errors, of any shape.
        data_range (`float`): Distance between the smallest and the largest value of a pixel: 2 for `[-1, 1]`.
    """
    ratio = (squared_error / data_range**2).clamp(min=10 ** (-PEAK_PSNR / 10))
    return -10 * ratio.log10()


def codebook_use(counts: torch.LongTensor) -> tuple[float, float]:
    """
    Args:
        counts (`torch.LongTensor` of shape `(K,)`): How often each code was used.

    Returns:
        The share of codes that were used, and the perplexity of the codes, at most K.
    """
    probabilities = counts.double() / counts.sum().clamp(min=1)
    usage = (counts > 0).double().mean()
    return usage.item(), torch.special.entr(probabilities).sum().exp().item()


__all__ = ["PEAK_PSNR", "codebook_use", "psnr_of"]
