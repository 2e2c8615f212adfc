"""Muon (Jordan et al. 2024) for matrices and convolutions, AdamW for all else, as one optimizer.

- Muon moves a weight by its momentum with all singular values set near 1. The demo's small networks then need
  fewer steps than with AdamW; the update costs a few matrix products.
- Weights of one shape are orthogonalized together, in bfloat16.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SMALLEST_SIDE = 9
MOMENTUM = 0.95
RMS_OF_ADAMW = 0.2


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Sets the singular values of `(n, rows, columns)` near 1 (about 0.7 to 1.2) by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon suits: matrices and convolutions between hidden layers. Embeddings and heads, whose rows stand for
    tokens or codes, and layers from or to few channels are left to AdamW."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 4)
        and min(parameter.shape[:2]) >= SMALLEST_SIDE
        and not any(word in name for word in ("embed", "lm_head", "visual_head"))
    ]


def split_for_muon(
    groups: list[dict[str, Any]], matrices: list[nn.Parameter], rate_factor: float
) -> list[dict[str, Any]]:
    """Parameter groups, each split into what AdamW and what Muon moves, the latter at `rate_factor` times its rate."""
    chosen = {id(matrix) for matrix in matrices}
    split = []
    for group in groups:
        for by_muon in (False, True):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in chosen) == by_muon]
            rate = group["lr"] * (rate_factor if by_muon else 1)
            split.append({**group, "params": parameters, "lr": rate, "orthogonalize": by_muon})
    return [group for group in split if group["params"]]


class MuonAdamW(torch.optim.AdamW):
    """AdamW, in which groups with `orthogonalize=True` take Muon's step instead (with Nesterov momentum).

    Muon's step is scaled by `0.2 sqrt(max(rows, columns))`, which gives it the size of AdamW's at the same rate
    (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

    Args:
        params: Parameters or parameter groups; `orthogonalize` is False by default.
        kwargs: Of [`torch.optim.AdamW`].
    """

    def __init__(self, params: Any, **kwargs: Any):
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        super().__init__([{"orthogonalize": False, **group} for group in groups], **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        every = self.param_groups
        self.param_groups = [group for group in every if not group["orthogonalize"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["orthogonalize"]:
                self._step_orthogonally(group)
        return loss

    def _step_orthogonally(self, group: dict[str, Any]):
        updates = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                # A step count that AdamW's own code for loading states expects of every parameter.
                state["step"] = torch.zeros(())
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = parameter.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
            updates[update.shape].append((parameter, update))
        for shape, entries in updates.items():
            size = group["lr"] * RMS_OF_ADAMW * max(shape) ** 0.5
            parameters, matrices = zip(*entries, strict=True)
            for parameter, direction in zip(parameters, orthogonalize(torch.stack(matrices)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction.view_as(parameter), alpha=size)


__all__ = ["MuonAdamW", "hidden_matrices", "orthogonalize", "split_for_muon"]
