"""Models in shards over processes: FSDP2 (`training.fsdp`) and DeepSpeed (`training.deepspeed`)."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations import is_deepspeed_available

from modeling_ett.modeling_ibq import IBQModel

from .arguments import ETTTrainingArguments

DEEPSPEED_CONFIGS = Path(__file__).parent / "deepspeed"


def find_deepspeed_config(name: str) -> str:
    """A configuration's file: its own path, or that of one which comes with the package, by its name.

    Raises:
        ValueError: There is no such file, or deepspeed is not installed.
    """
    available = {path.stem: path for path in sorted(DEEPSPEED_CONFIGS.glob("*.json"))}
    path = available.get(name, Path(name))
    if not path.is_file():
        raise ValueError(
            f"training.deepspeed is {name!r}; expected {' or '.join(available)}, or a file of DeepSpeed's settings."
        )
    if not is_deepspeed_available():
        raise ValueError(
            "training.deepspeed needs deepspeed, which is not installed: pip install ett[deepspeed]; or use "
            "training.fsdp=true, which needs nothing more."
        )
    return str(path)


def check_sharding(model: nn.Module, args: ETTTrainingArguments):
    """
    Raises:
        ValueError: The model, or something in the settings, cannot be in shards.
    """
    if not (args.fsdp or args.deepspeed):
        return
    way = "training.fsdp" if args.fsdp else "training.deepspeed"
    if isinstance(model, IBQModel):
        raise ValueError(f"A tokenizer alone is small enough for every device; leave {way} out.")
    if args.fsdp and args.fsdp_plugin_args.get("fsdp_version") != 2:
        raise ValueError("training.fsdp is FSDP2 only; leave version out of training.fsdp_config.")
    if args.muon_rate_factor is not None:
        raise ValueError(f"Muon needs whole matrices, which {way} cuts; set training.muon_rate_factor=null.")
    if args.deepspeed and args.ema_decay is not None:
        raise ValueError(
            "DeepSpeed keeps the weights to itself; set training.ema_decay=null, or use training.fsdp=true."
        )


def keep_full_precision(trainer: Trainer):
    """Lets FSDP2 gather weights in float32, as they are kept. The model computes in half precision by autocast, as it
    does without shards; so pictures, codes and the tokenizer's weights are never rounded."""
    if not trainer.is_fsdp_enabled:
        return
    accelerator, model = trainer.accelerator, trainer.model
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision != "no":
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
        # Accelerate leaves autocast to FSDP's policy.
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """All weights of a model in shards, averaged where there is an average, on the CPU of the main process; None of a
    model that is in one piece. All processes take part."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    with trainer.averaged_weights():
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)


__all__ = ["check_sharding", "find_deepspeed_config", "keep_full_precision", "whole_weights"]
