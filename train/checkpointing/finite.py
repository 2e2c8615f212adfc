"""Losses and gradients that are no numbers: found before the optimizer uses them, and told with the examples they came
from."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

NAMES_SHOWN = 8


class NonFiniteLossError(ValueError):
    """A loss, a gradient or a weight is NaN or infinite. The message names the step, the terms, the parts of the model
    and the examples."""


class StepWatch:
    """What one process has seen of an optimizer's step: the terms of the losses and the examples' names, by
    micro-batch. It reads no value before it is asked for the findings, so that nothing waits for the device."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Before the next step."""
        self.names: list[list[str]] = []
        self.terms: list[tuple[str, int, torch.Tensor]] = []

    def begin(self, names: list[str]):
        """A micro-batch of examples with these names, or none."""
        self.names.append(names)

    def add(self, name: str, value: torch.Tensor):
        """A term, `()`, without graph, of the present micro-batch."""
        self.terms.append((name, len(self.names), value))

    def is_broken(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Whether a term or a gradient is not finite, `()` of bool, on the device."""
        values = [value.float() for _, _, value in self.terms]
        if gradients:
            values.append(nn.utils.get_total_norm(gradients).float())
        return ~torch.stack(values).isfinite().all()

    def findings(self, parts: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
        """The terms that are not finite, the examples of their micro-batches (those of all, where only gradients are
        not finite), and which parts' gradients are not."""
        broken = [(name, batch, value.item()) for name, batch, value in self.terms if not value.isfinite()]
        batches = sorted({batch for _, batch, _ in broken}) or range(1, len(self.names) + 1)
        return {
            "losses": [{"name": name, "micro_batch": batch, "value": str(value)} for name, batch, value in broken],
            "gradients": {
                part: "finite" if is_finite(gradients) else "not finite"
                for part, gradients in parts.items()
                if gradients
            },
            "examples": {str(batch): self.names[batch - 1] for batch in batches},
        }


def gradients_of(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients there are; of parameters that are shared out among processes, this one's shares."""
    return _own_shares([parameter.grad for parameter in parameters if parameter.grad is not None])


def is_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no number in these tensors, or in this process's shares of them, is NaN or infinite."""
    shares = [tensor for tensor in _own_shares(tensors) if tensor.is_floating_point()]
    return bool(nn.utils.get_total_norm(shares).isfinite())


def _own_shares(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of tensors that are shared out among processes, this one's shares; others as they are."""
    # ZeRO-3 leaves its share at a parameter that is empty itself.
    return [
        tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
        for tensor in tensors
    ]


def describe_findings(step: int, findings: list[dict[str, Any]]) -> str:
    """What was found in the processes, in a sentence."""
    losses = dict.fromkeys(
        f"{loss['name']} is {loss['value']} in micro-batch {loss['micro_batch']}"
        for found in findings
        for loss in found["losses"]
    )
    parts = dict.fromkeys(
        part for found in findings for part, state in found["gradients"].items() if state != "finite"
    )
    # Gradients are shared: a process whose own losses are finite has them from another.
    sources = [found for found in findings if found["losses"]] or findings
    names = [name for found in sources for batch in found["examples"].values() for name in batch]
    told = [*losses]
    if parts:
        told.append(f"the gradients of {', '.join(parts)} are not finite")
    shown = ", ".join(names[:NAMES_SHOWN])
    if len(names) > NAMES_SHOWN:
        shown += f" and {len(names) - NAMES_SHOWN} more"
    return f"Step {step}: {'; '.join(told)}{f' (examples: {shown})' if names else ''}."


__all__ = ["NonFiniteLossError", "StepWatch", "describe_findings", "gradients_of", "is_finite"]
