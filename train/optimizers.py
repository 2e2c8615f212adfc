"""Groups of an optimizer by the parts of a model, and the clipping of their gradients."""

from typing import Any

import torch
from torch import nn

from .arguments import ETTTrainingArguments
from .monitoring.figures import gradient_norm

Parts = dict[str, list[nn.Parameter]]


def parameter_groups(parts: Parts, args: ETTTrainingArguments) -> list[dict[str, Any]]:
    """A group for each part that trains, with its learning rate and its name as `part`.

    Raises:
        ValueError: `part_learning_rates` or `part_max_grad_norms` names an unknown part, or nothing trains.
    """
    for name in ("part_learning_rates", "part_max_grad_norms"):
        if unknown := sorted(set(getattr(args, name) or {}) - set(parts)):
            raise ValueError(f"{name} names {', '.join(unknown)}; this model's parts are {', '.join(parts)}.")
    rates = args.part_learning_rates or {}
    groups = [
        {"params": trained, "lr": rates.get(part, args.learning_rate), "part": part}
        for part, parameters in parts.items()
        if (trained := [parameter for parameter in parameters if parameter.requires_grad])
    ]
    if not groups:
        raise ValueError("Nothing to train: every parameter of the model is frozen.")
    return groups


def gradient_norms(parts: Parts, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Norms of the gradients by part, of shape `()`, of parts that have gradients.

    Args:
        scale (`float`): By which float16 has multiplied the gradients.
    """
    norms = {part: gradient_norm(parameters) for part, parameters in parts.items()}
    return {part: norm / scale for part, norm in norms.items() if norm is not None}


def clip_by_part(parts: Parts, limits: dict[str, float], joint: float, scale: float = 1.0):
    """Clips the gradients of the parts in `limits` each to its own norm, and those of the others together to `joint`.
    A limit of 0 is none."""
    others = [parameter for part in parts if part not in limits for parameter in parts[part]]
    for parameters, limit in [*((parts[part], limits[part]) for part in limits), (others, joint)]:
        if limit:
            nn.utils.clip_grad_norm_(parameters, limit * scale)


__all__ = ["clip_by_part", "gradient_norms", "parameter_groups"]
