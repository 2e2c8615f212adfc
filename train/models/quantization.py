"""Language models whose linear maps are kept in 4 bits (QLoRA, Dettmers et al. 2023), for adapters beside them.

Everything else has its full precision: tokenizer, projector, heads, text embeddings, norms and the adapters. Matrices
are made whole again in half precision for each product, and the finished model has the weights that it started from,
never rounded.
"""

from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..recipes import Recipe

FULL_PRECISION = ["model.vision_tokenizer", "model.index_embedding", "model.projector", "visual_head", "lm_head"]


def check_quantization(recipe: Recipe):
    """Checks what `model.load_in_4bit` needs of the rest of the recipe, and of this machine.

    Raises:
        ValueError: Nothing would learn beside the rounded weights, no folder holds them whole, they would be cut into
            shards, or bitsandbytes is missing.
    """
    if not recipe.model.load_in_4bit:
        return
    if recipe.lora.rank is None:
        raise ValueError(
            "model.load_in_4bit needs adapters, since weights in 4 bits cannot learn: give lora.rank, for instance 64."
        )
    if recipe.model.path is None:
        raise ValueError(
            "model.load_in_4bit needs an ETT model's folder (model.path), from which the weights come again, whole, "
            "when training is done."
        )
    if sharded := [name for name in ("fsdp", "deepspeed") if recipe.training.get(name)]:
        raise ValueError(
            f"Weights in 4 bits are not cut into shards; leave training.{sharded[0]} out, or set "
            "model.load_in_4bit=false."
        )
    if not is_bitsandbytes_available():
        raise ValueError(
            "model.load_in_4bit needs bitsandbytes, which is not installed: pip install ett[bitsandbytes]."
        )


def quantization_arguments(compute_dtype: torch.dtype) -> dict[str, Any]:
    """How `from_pretrained` loads an ETT model with the language model's linear maps in 4-bit NormalFloat (NF4), whose
    scales are quantized again.

    Args:
        compute_dtype: Type of the products.
    """
    return {
        "dtype": torch.float32,
        "device_map": {"": PartialState().device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=FULL_PRECISION,
        ),
    }


def stay_trainable(model: nn.Module):
    """Keeps bitsandbytes from packing weights anew for some CPUs at the first product without gradients, after which
    adapters could not learn beside them."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds, two of which share a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


__all__ = ["check_quantization", "num_weights", "quantization_arguments", "stay_trainable"]
