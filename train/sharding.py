"""Models in shards over processes: FSDP2 (`training.fsdp`) and DeepSpeed (`training.deepspeed`)."""

from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations import is_deepspeed_available

from ett.modeling_ett.modeling_ibq import IBQModel

from .arguments import ETTTrainingArguments

DEEPSPEED_CONFIGS = Path(__file__).parent / "deepspeed"

_ROUNDS = "that would round the tokenizer's weights; training.bf16=true computes in bfloat16 and keeps float32"
_OFFLOADS = "what is offloaded cannot be checked before a step"
REFUSED_SETTINGS = {
    "optimizer": "the optimizer is the recipe's",
    "scheduler": "the schedule is the recipe's",
    "bf16.enabled": _ROUNDS,
    "fp16.enabled": _ROUNDS,
    "zero_optimization.offload_optimizer": _OFFLOADS,
    "zero_optimization.offload_param": _OFFLOADS,
}
"""Settings of DeepSpeed's own, and why they cannot be."""


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
        ValueError: The model, something in the settings, or the installed torch allows no shards.
    """
    if not (args.fsdp or args.deepspeed):
        return
    way = "training.fsdp" if args.fsdp else "training.deepspeed"
    if isinstance(model, IBQModel):
        raise ValueError(f"A tokenizer alone is small enough for every device; leave {way} out.")
    if args.fsdp and args.fsdp_plugin_args.get("fsdp_version") != 2:
        raise ValueError("training.fsdp is FSDP2 only; leave version out of training.fsdp_config.")
    if args.fsdp and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(f"training.fsdp needs torch 2.13 or newer, not {torch.__version__}; install it, or use DDP.")
    if args.muon_rate_factor is not None:
        raise ValueError(f"Muon needs whole matrices, which {way} cuts; set training.muon_rate_factor=null.")
    if args.deepspeed:
        _check_deepspeed(args)


def _check_deepspeed(args: ETTTrainingArguments):
    if args.ema_decay is not None:
        raise ValueError(
            "DeepSpeed keeps the weights to itself; set training.ema_decay=null, or use training.fsdp=true."
        )
    if args.adaptive_adversarial_weight:
        raise ValueError(
            "DeepSpeed takes every backward pass for a step's; set training.adaptive_adversarial_weight=false."
        )
    if args.part_max_grad_norms:
        raise ValueError(
            "DeepSpeed clips all gradients together; set training.part_max_grad_norms=null, or use training.fsdp=true."
        )
    if args.fp16:
        raise ValueError(
            "DeepSpeed scales losses of float16 only where it rounds all weights, the tokenizer's too; set "
            "training.fp16=false and training.bf16=true."
        )
    settings = args.hf_deepspeed_config
    for name, reason in REFUSED_SETTINGS.items():
        if settings.get_value(name):
            raise ValueError(f"The settings of training.deepspeed have {name}, but {reason}. Remove it there.")
    stage = settings.get_value("zero_optimization.stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"The settings of training.deepspeed have ZeRO's stage {stage}; expected 1, 2 or 3.")
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if stage == 3 and not settings.is_true(gathers):
        raise ValueError(f"The settings of training.deepspeed need {gathers}=true: a finished folder is in one piece.")


def require_shards(trainer: Trainer):
    """
    Raises:
        ValueError: `training.fsdp` is given, but accelerate shards nothing on this device: DDP would train instead.
    """
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"training.fsdp shards models over accelerators, and this run is on the {trainer.args.device.type}; leave "
            "it out, so that every process holds the whole model (DDP)."
        )


def reduce_unused_parameters(model: FSDPModule):
    """Lets a process without an image in its batch take part in reducing the gradients of those that have one. Every
    process must reduce the same gradients; the root's hold what only images use."""
    model.set_reduce_scatter_unused_params(True, recurse=False)


def keep_full_precision(trainer: Trainer):
    """Lets FSDP2 and DeepSpeed keep and gather weights in float32. The model computes in half precision by autocast,
    as it does without shards; so images, codes and the tokenizer's weights are never rounded."""
    accelerator, model = trainer.accelerator, trainer.model
    precision = accelerator.mixed_precision
    if trainer.is_fsdp_enabled:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    elif trainer.is_deepspeed_enabled:
        accelerator.state.deepspeed_plugin.deepspeed_config["bf16"] = {"enabled": False}
    else:
        return
    if precision != "no":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        # Accelerate leaves half precision to FSDP's policy and to DeepSpeed's engine.
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


class DeferredStep(DeepSpeedEngineWrapper):
    """DeepSpeed's engine, whose optimizer waits for [`~DeferredStep.step`]; accelerate's steps at the end of the
    backward pass, before anything can look at the gradients."""

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs):
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def step(self):
        self.engine.step()

    def gradients(self) -> dict[str, list[torch.Tensor]]:
        """Gradients of a step by part, averaged over processes, of which each has its own shares."""
        optimizer = self.engine.optimizer
        # ZeRO-3 divides the optimizer's groups further.
        group_numbers = getattr(optimizer, "sub_group_to_group_id", None)
        parts = defaultdict(list)
        for number, shares in optimizer.averaged_gradients.items():
            group = optimizer.param_groups[number if group_numbers is None else group_numbers[number]]
            parts[group["part"]].extend(shares)
        return dict(parts)


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """All weights of a model in shards, averaged where there is an average, on the CPU of the main process; None of a
    model that is in one piece. All processes take part."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    with trainer.averaged_weights():
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)


__all__ = [
    "check_sharding",
    "find_deepspeed_config",
    "keep_full_precision",
    "reduce_unused_parameters",
    "require_shards",
    "whole_weights",
]
