"""A head that scores tokens, or, given labels, computes their loss without ever holding all scores at once."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Scores held at a time: 64 MiB in float32."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made beside the loss, while a chunk's scores are there, so nothing is computed twice."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden_states) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        for start in range(0, len(labels), rows):
            part, own = hidden_states[start : start + rows], labels[start : start + rows, None]
            scores = (part @ weight.T).float()
            log_sums = scores.logsumexp(dim=1, keepdim=True)
            loss += (log_sums - scores.gather(1, own)).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = scores.sub_(log_sums).exp_().scatter_add_(1, own, -torch.ones_like(log_sums)).to(weight.dtype)
            if wants_hidden:
                hidden_grad[start : start + rows] = grad @ weight
            if wants_weight:
                weight_grad.addmm_(grad.T, part)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx, loss_grad: torch.Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * loss_grad.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * loss_grad.to(weight_grad.dtype),
            None,
        )


def summed_cross_entropy(head: nn.Module, hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """
    Cross-entropy of a head of any kind, for instance one with an adapter beside it. A chunk's scores are computed once
    more in the backward pass, and are never held for all positions at once.

    Args:
        head (`nn.Module`): Hidden states `(num_labels, hidden_size)` to scores `(num_labels, num_tokens)`.
        hidden_states (`torch.Tensor` of shape `(..., hidden_size)`).
        labels (`torch.LongTensor` of shape `(...)`): In `[0, num_tokens)`, or -100 where there is nothing to predict.

    Returns:
        Sum of the cross-entropies (in nats), of shape `()` in float32.
    """

    def loss(states: torch.Tensor, own: torch.LongTensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), own, reduction="sum")

    is_labelled = (labels != -100).to(hidden_states.device)
    hidden_states, labels = hidden_states[is_labelled], labels.to(hidden_states.device)[is_labelled]
    rows = max(1, CHUNK_ELEMENTS // max(1, head.weight.shape[0]))
    if len(labels) <= rows:
        return loss(hidden_states, labels)
    chunks = zip(hidden_states.split(rows), labels.split(rows), strict=True)
    return sum(checkpoint(loss, states, own, use_reentrant=False) for states, own in chunks)


class ScoringHead(nn.Linear):
    """Hidden states to scores, `(..., hidden_size)` to `(..., num_tokens)`, without bias.

    Scores of all positions over 131,072 tokens are larger than anything else in a step; the loss needs those of
    labelled positions only, a chunk at a time.
    """

    def __init__(self, hidden_size: int, num_tokens: int, **kwargs):
        super().__init__(hidden_size, num_tokens, bias=False, **kwargs)

    def forward(self, hidden_states: torch.Tensor, labels: torch.LongTensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`).
            labels (`torch.LongTensor` of shape `(...)`, *optional*): In `[0, num_tokens)`, or -100 where there is
                nothing to predict.

        Returns:
            Scores; or with labels the sum of their cross-entropies (in nats), of shape `()` in float32.
        """
        if labels is None:
            return super().forward(hidden_states)
        is_labelled = labels != -100
        hidden_states, labels, weight = hidden_states[is_labelled], labels[is_labelled], self.weight
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        labels = labels.to(hidden_states.device)
        with torch.autocast(device_type, enabled=False):
            if device_type == "cuda" and hasattr(F, "linear_cross_entropy"):
                options = torch.nn.LinearCrossEntropyOptions()
                return F.linear_cross_entropy(hidden_states, weight, labels, reduction="sum", options=options).float()
            return _ChunkedCrossEntropy.apply(hidden_states, weight, labels)


__all__ = ["ScoringHead", "summed_cross_entropy"]
