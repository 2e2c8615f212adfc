"""Measures whether gradients reach the encoder through the quantizer.

- A gradient passes from embeddings to latents through the straight-through softmax `p` alone: its Jacobian is
  `logit_scale * Cov_p(codes)`. Where one code has all the probability, it is 0, and captions cannot tune the encoder.
- The yardstick is a plain straight-through copy, which hands the same gradient on unchanged.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .quantizer_ibq import IBQQuantizer, token_blocks

DEAD_BELOW = 1e-3
"""Ratio of the gradient to its copy below which nothing of practical size passes."""
CLOSED_FROM = 0.99
"""Share of dead tokens from which the path counts as closed, whatever the few others get."""


def is_closed(ratio: float, dead_tokens: float) -> bool:
    """Whether captions cannot tune the encoder. Single tokens halfway between two codes may have huge gradients, so a
    high ratio alone does not tell that they can.

    Args:
        ratio, dead_tokens (`float`): Of [`GradientPath.summary`].
    """
    return ratio < DEAD_BELOW or dead_tokens >= CLOSED_FROM


class GradientPath(NamedTuple):
    """Measures of each token.

    Args:
        passed (`torch.Tensor` of shape `(N,)`): Norm of the gradient in the latent, behind the quantizer.
        copied (`torch.Tensor` of shape `(N,)`): Norm of the same gradient behind a plain straight-through copy.
        largest_probability (`torch.Tensor` of shape `(N,)`): Of the straight-through softmax, in `(0, 1]`.
    """

    passed: torch.Tensor
    copied: torch.Tensor
    largest_probability: torch.Tensor

    @classmethod
    def join(cls, paths: Iterable["GradientPath"]) -> "GradientPath":
        """Measures of several batches as those of one."""
        return cls(*map(torch.cat, zip(*paths, strict=True)))

    def summary(self) -> dict[str, torch.Tensor]:
        """Figures of shape `()`: `ratio`, the norm of all gradients over that of their copies; `largest_probability`,
        a mean; `dead_tokens`, the share of tokens whose own ratio is below [`DEAD_BELOW`]."""
        return {
            "ratio": torch.linalg.vector_norm(self.passed) / torch.linalg.vector_norm(self.copied),
            "largest_probability": self.largest_probability.mean(),
            "dead_tokens": (self.passed < DEAD_BELOW * self.copied).float().mean(),
        }


def measure_gradient_path(quantizer: IBQQuantizer, latents: torch.Tensor, seed: int = 0) -> GradientPath:
    """Sends random gradients (unit Gaussian, the same for the same seed) through the quantizer, `logit_scale` and
    `straight_through_weight` included. Neither weights nor the global random numbers change.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, dim, height, width)`): The encoder's output.
    """
    with torch.inference_mode(False), torch.enable_grad():
        precision = torch.promote_types(latents.dtype, torch.float32)
        latents = latents.detach().clone().to(precision).requires_grad_()
        # Not by its call: this function may run in a hook of it.
        embeddings = quantizer.forward(latents, return_losses=False).embeddings
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(latents.shape, generator=generator, dtype=precision).to(latents.device)
        tokens = quantizer.tokens(latents)
        (passed,) = torch.autograd.grad(embeddings, latents, upstream)
        (copied,) = torch.autograd.grad(tokens, latents, upstream.permute(0, 2, 3, 1).flatten(0, 2))
    with torch.no_grad():
        norms = (torch.linalg.vector_norm(gradient, dim=1).flatten() for gradient in (passed, copied))
        return GradientPath(*norms, largest_probabilities(tokens, quantizer.codebook(), quantizer.logit_scale))


@torch.no_grad()
def largest_probabilities(tokens: torch.Tensor, table: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """Largest probability of each token's straight-through softmax, of shape `(N,)`. Logits are held block by block.

    Args:
        tokens (`torch.Tensor` of shape `(N, dim)`), table (`torch.Tensor` of shape `(K, dim)`): See
            [`~IBQQuantizer.tokens`] and [`~IBQQuantizer.codebook`].
    """
    largest = tokens.new_empty(len(tokens))
    for rows in token_blocks(len(tokens), len(table)):
        logits = tokens[rows] @ table.T.to(tokens.dtype)
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        # The best code's logit is 0 now.
        largest[rows] = 1 / logits.mul_(logit_scale).exp_().sum(dim=-1)
    return largest


__all__ = ["DEAD_BELOW", "GradientPath", "is_closed", "largest_probabilities", "measure_gradient_path"]
