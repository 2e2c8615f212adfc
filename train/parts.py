"""The parts of a model, of which a stage trains some."""

from collections import defaultdict

from torch import nn

from ett.modeling_ett.modeling_ibq import IBQModel

from .models.adapters import is_adapter_weight
from .models.quantization import num_weights
from .recipes import PARTS

ADAPTER_PART = "adapter"


def model_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by part: an [`IBQModel`] is one; the text head belongs to the language model; low-rank adapters are a
    part of their own, `adapter`."""
    parts = defaultdict(list)
    for name, parameter in model.named_parameters():
        if isinstance(model, IBQModel):
            part = "vision_tokenizer"
        elif is_adapter_weight(name):
            part = ADAPTER_PART
        elif name.startswith("lm_head"):
            part = "language_model"
        else:
            part = next(part for part in PARTS if part in name.split("."))
        parts[part].append(parameter)
    return dict(parts)


def train_only(model: nn.Module, parts: list[str]) -> dict[str, tuple[int, bool]]:
    """Freezes all but the named parts; of a language model with adapters these alone train. Returns each part's number
    of parameters and whether it trains.

    Raises:
        ValueError: The model has no such part.
    """
    available = model_parts(model)
    if ADAPTER_PART in available:
        parts = [ADAPTER_PART if part == "language_model" else part for part in parts]
    unknown = [part for part in parts if part not in available]
    if unknown:
        raise ValueError(f"This model has no part {', '.join(unknown)}; its parts are {', '.join(available)}.")
    for part, parameters in available.items():
        for parameter in parameters:
            parameter.requires_grad_(part in parts)
    return {part: (sum(map(num_weights, parameters)), part in parts) for part, parameters in available.items()}


__all__ = ["ADAPTER_PART", "PARTS", "model_parts", "train_only"]
