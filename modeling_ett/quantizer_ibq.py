"""Index backpropagation quantization (IBQ): one code a latent, gradients for the whole codebook.

- A code is the argmax of the dot product between a latent and every codebook row, not the nearest row.
- The forward value is the chosen row; the backward pass sees the softmax over all rows, so that every row learns.
- An entropy term keeps single assignments certain and the use of the codebook even.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class IBQQuantizerOutput(BaseOutput):
    """What quantizing a batch of latents gives. The losses are `None` unless they were asked for.

    Args:
        embeddings (`torch.Tensor` of shape `(batch_size, dim, height, width)`):
            The chosen codebook rows, differentiable in the latents and in the whole codebook.
        codes (`torch.LongTensor` of shape `(batch_size, height, width)`): The chosen rows' numbers, in `[0, K)`.
        quantization_loss (`torch.Tensor` of shape `()`): Commitment and codebook terms; in value
            `(2 + codebook_loss_weight)` times the mean squared distance between latents and their codes.
        sample_entropy (`torch.Tensor` of shape `()`): Mean entropy of a latent's assignment, in nats.
        average_entropy (`torch.Tensor` of shape `()`): Entropy of the batch's mean assignment, in nats.
        entropy_loss (`torch.Tensor` of shape `()`): `sample_entropy - average_entropy`.
    """

    embeddings: torch.Tensor
    codes: torch.LongTensor
    quantization_loss: torch.Tensor | None = None
    sample_entropy: torch.Tensor | None = None
    average_entropy: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


class Codebook(nn.Embedding):
    """An embedding that also hands out its whole table, through its call, so that hooks which fetch offloaded
    weights see every use of them."""

    def forward(self, codes: torch.LongTensor | None = None) -> torch.Tensor:
        return self.weight if codes is None else super().forward(codes)


class IBQQuantizer(nn.Module):
    """Index backpropagation quantization (Shi et al., "Taming Scalable Visual Tokenizer for Autoregressive Image
    Generation", section 3).

    Args:
        num_codes (`int`): Codebook size K.
        dim (`int`): Width D of a code.
        l2_normalize (`bool`): Compare and use latents and codes on the unit sphere.
        logit_scale (`float`): Factor on the logits of the straight-through softmax. On the unit sphere logits lie in
            `[-1, 1]`, where a scale of 1 would spread the gradient evenly over the codebook.
        codebook_loss_weight (`float`): Weight of the term that moves codes towards latents; the commitment term, which
            moves latents towards codes, has weight 1, as in the code that made the public checkpoints.
        entropy_temperature (`float`): Temperature of the entropy term's softmax.
    """

    entropy_eps = 1e-5

    def __init__(
        self,
        num_codes: int,
        dim: int,
        l2_normalize: bool = False,
        logit_scale: float = 1.0,
        codebook_loss_weight: float = 0.25,
        entropy_temperature: float = 0.01,
    ):
        super().__init__()
        self.embedding = Codebook(num_codes, dim)
        self.l2_normalize = l2_normalize
        self.logit_scale = logit_scale
        self.codebook_loss_weight = codebook_loss_weight
        self.entropy_temperature = entropy_temperature

    def codebook(self) -> torch.Tensor:
        """The table of codes as it is used, of shape `(K, D)`."""
        table = self.embedding()
        return F.normalize(table, dim=-1) if self.l2_normalize else table

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes `(batch_size, height, width)` to embeddings `(batch_size, dim, height, width)`."""
        embeddings = self.embedding(codes)
        if self.l2_normalize:
            embeddings = F.normalize(embeddings, dim=-1)
        return embeddings.permute(0, 3, 1, 2)

    def forward(self, latents: torch.Tensor, return_losses: bool = True) -> IBQQuantizerOutput:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, dim, height, width)`): The encoder's output.
            return_losses (`bool`): Whether to compute the quantization and entropy losses.
        """
        with torch.autocast(latents.device.type, enabled=False):
            precision = torch.promote_types(latents.dtype, torch.float32)
            table = self.codebook().to(precision)
            tokens = latents.permute(0, 2, 3, 1).to(precision)
            if self.l2_normalize:
                tokens = F.normalize(tokens, dim=-1)
            logits = tokens @ table.T
            codes = logits.argmax(dim=-1)
            hard = F.embedding(codes, table)

            embeddings = hard
            if logits.requires_grad:
                # o - sg(p) + p times E has the value E[k]; its gradient reaches E through the hard row and through p.
                soft = (self.logit_scale * logits).softmax(dim=-1) @ table.detach()
                embeddings = hard + soft - soft.detach()
            losses = self._losses(tokens, hard, embeddings, logits) if return_losses else {}
        return IBQQuantizerOutput(embeddings=embeddings.permute(0, 3, 1, 2).to(latents.dtype), codes=codes, **losses)

    def _losses(
        self, tokens: torch.Tensor, hard: torch.Tensor, embeddings: torch.Tensor, logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        quantization_loss = (
            F.mse_loss(embeddings, tokens)
            + F.mse_loss(tokens, hard.detach())
            + self.codebook_loss_weight * F.mse_loss(hard, tokens.detach())
        )
        log_probabilities = (logits / self.entropy_temperature).flatten(0, -2).log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        sample_entropy = -(probabilities * log_probabilities).sum(dim=-1).mean()
        average = probabilities.mean(dim=0)
        average_entropy = -(average * (average + self.entropy_eps).log()).sum()
        return {
            "quantization_loss": quantization_loss,
            "sample_entropy": sample_entropy,
            "average_entropy": average_entropy,
            "entropy_loss": sample_entropy - average_entropy,
        }


__all__ = ["IBQQuantizer", "IBQQuantizerOutput"]
