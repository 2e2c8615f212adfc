"""Settings of the one trainer: those of transformers, and the joint objective's."""

import os
import warnings
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config


@dataclass
class ETTTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the paper's joint objective. Changed defaults: Adam without weight decay,
    cosine schedule with 3% warm-up (section 4.1), columns are kept, DDP looks for unused parameters under gradient
    checkpointing, too.

    Parameters that control the size of a step:
        global_batch_size.

    Parameters that control the joint objective (equations 1 and 3):
        alpha, caption_gradient_to_tokenizer, squared_error_weight, quantization_weight, perceptual_weight,
        adversarial_weight, entropy_weight, adaptive_adversarial_weight.

    Parameters that control the perceptual loss:
        critics_batch_size, perceptual_network, perceptual_pretrained.

    Parameters that control the discriminator:
        discriminator_learning_rate, discriminator_lr_scheduler_type, discriminator_max_grad_norm,
        discriminator_start_step, discriminator_warmup_steps, discriminator_width, discriminator_layers, lecam_weight.

    Parameters that control the optimizer:
        part_learning_rates, part_max_grad_norms, muon_rate_factor, ema_decay.

    Parameters that control what is shown of a model that learns:
        sample_steps, peak_flops.
    """

    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay; the paper's Adam has none."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up, in steps or, below 1, as a share of all."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs every column."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and inf in logged losses."})

    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per step on all devices together; gradient accumulation follows from it."},
    )

    alpha: float = field(
        default=0.25,
        metadata={
            "help": "Weight of the VQ loss beside the caption loss (equation 3). Equation 2 is a sum over a caption's "
            "tokens; the caption loss here is a mean over the tokens of the global batch. With captions of T tokens, "
            "an alpha beside the sum is alpha / T here."
        },
    )
    caption_gradient_to_tokenizer: bool = field(
        default=True,
        metadata={
            "help": "Whether the caption loss trains the tokenizer. If false, alpha * L_vq alone does: a control for "
            "studies, in which the projector and the language model still learn from captions."
        },
    )
    squared_error_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared error beside the absolute error; the paper's is 0."}
    )
    quantization_weight: float = field(default=1.0, metadata={"help": "Weight of the quantization loss."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of LPIPS; 0 leaves it out."})
    adversarial_weight: float = field(
        default=0.1, metadata={"help": "Weight of the GAN loss; 0 trains no discriminator."}
    )
    entropy_weight: float = field(default=0.05, metadata={"help": "Weight of the entropy loss."})

    critics_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images of a batch that LPIPS and discriminator see; null for all."},
    )
    perceptual_network: str = field(default="vgg", metadata={"help": "LPIPS network: vgg, alex or squeeze."})
    perceptual_pretrained: bool = field(
        default=True, metadata={"help": "Use ImageNet weights in LPIPS; otherwise random weights."}
    )

    adaptive_adversarial_weight: bool = field(
        default=False,
        metadata={"help": "Multiply adversarial_weight so that the GAN loss balances the others (VQGAN)."},
    )

    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the discriminator; null for `learning_rate`."}
    )
    discriminator_lr_scheduler_type: str | None = field(
        default=None,
        metadata={"help": "Schedule of the discriminator, from its first step on; null for `lr_scheduler_type`."},
    )
    discriminator_max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Limit of the norm of the discriminator's gradients; null for `max_grad_norm`."},
    )
    discriminator_start_step: int = field(
        default=0, metadata={"help": "First step in which the discriminator learns."}
    )
    discriminator_warmup_steps: int = field(
        default=0,
        metadata={"help": "First steps of the discriminator, in which its loss does not count for the tokenizer."},
    )
    discriminator_width: int = field(default=64, metadata={"help": "Channels of the discriminator's first layer."})
    discriminator_layers: int = field(
        default=3, metadata={"help": "Layers of the discriminator that halve the resolution."}
    )
    lecam_weight: float = field(default=0.05, metadata={"help": "Weight of LeCAM regularization."})

    part_learning_rates: dict[str, float] | None = field(
        default=None, metadata={"help": "Learning rates of single parts, by the names that `train` has."}
    )
    part_max_grad_norms: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "Limits of the gradient norm of single parts, each part by itself, 0 for no limit; max_grad_norm "
            "then holds for the other parts together."
        },
    )
    muon_rate_factor: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of Muon for hidden matrices and convolutions, as a multiple of their part's; null "
            "for no Muon."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of the moving average of the weights (EMA), which the finished folder holds; null for none."
        },
    )

    sample_steps: int = field(
        default=0,
        metadata={"help": "Steps between two samples of answers, generated images or reconstructions; 0 for none."},
    )

    peak_flops: float | None = field(
        default=None,
        metadata={"help": "Peak FLOP/s of a device, for the logged mfu; null for those of known GPUs."},
    )

    def __post_init__(self):
        if self.global_batch_size is not None:
            # Before transformers' own checks, which hand the accumulation on to DeepSpeed.
            steps = accumulation_steps(
                self.global_batch_size, self.per_device_train_batch_size, self._number_of_devices()
            )
            if self.gradient_accumulation_steps not in (1, steps):
                raise ValueError(
                    f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but {steps} follows from "
                    f"global_batch_size={self.global_batch_size}; remove the former, or set the latter to null."
                )
            self.gradient_accumulation_steps = steps
        with warnings.catch_warnings():
            # Deprecated in favour of activation_checkpointing, which older versions of transformers do not know.
            warnings.filterwarnings("ignore", "`gradient_checkpointing", category=FutureWarning)
            super().__post_init__()
        # While it is known, transformers would cut models for ZeRO-3 as they are made, before parts can be joined.
        unset_hf_deepspeed_config()
        if self.ddp_find_unused_parameters is None:
            # Batches of text alone leave the projector out, perhaps in one process and not in another. Transformers
            # looks for unused parameters unless there is checkpointing, of which only the reentrant form forbids it.
            self.ddp_find_unused_parameters = not (self.activation_checkpointing_kwargs or {}).get("use_reentrant")
        for name in ("learning_rate", "lr_scheduler_type", "max_grad_norm"):
            if getattr(self, f"discriminator_{name}") is None:
                setattr(self, f"discriminator_{name}", getattr(self, name))
        if self.perceptual_network not in ("vgg", "alex", "squeeze"):
            raise ValueError(f"perceptual_network is {self.perceptual_network!r}; expected vgg, alex or squeeze.")
        for name, value in vars(self).items():
            if (name == "alpha" or name.endswith("_weight")) and value < 0:
                raise ValueError(f"{name} is {value}; a loss weight cannot be negative.")
        if self.muon_rate_factor is not None and self.muon_rate_factor <= 0:
            raise ValueError(f"muon_rate_factor is {self.muon_rate_factor}; expected a number above 0, or null.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected a number between 0 and 1, or null.")
        if self.discriminator_warmup_steps < 0:
            raise ValueError(
                f"discriminator_warmup_steps is {self.discriminator_warmup_steps}; expected a number of steps, or 0 "
                "for none."
            )
        if self.sample_steps < 0:
            raise ValueError(f"sample_steps is {self.sample_steps}; expected a number of steps, or 0 for none.")

    def check_samples(self, count: int, devices: int | None = None):
        """Checks that a batch is left where `dataloader_drop_last` drops the last one.

        Args:
            count: Samples of the data.
            devices: Devices that share a step, by default those of this run.

        Raises:
            ValueError: The data have fewer samples than a batch.
        """
        devices = self._number_of_devices() if devices is None else devices
        needed = self.per_device_train_batch_size * devices
        if self.dataloader_drop_last and count < needed:
            raise ValueError(
                f"The data have {count} samples, and a batch has {needed} ({self.per_device_train_batch_size} on each "
                "device): with dataloader_drop_last=true no batch is left. Give more data, set a smaller "
                "per_device_train_batch_size, or set dataloader_drop_last=false."
            )

    def _number_of_devices(self) -> int:
        """Devices that share a step. One process alone takes all the GPUs that it sees."""
        processes = int(os.environ.get("WORLD_SIZE", 1))
        return processes if processes > 1 or self.use_cpu else max(1, torch.cuda.device_count())


def accumulation_steps(global_batch_size: int, per_device_batch_size: int, devices: int) -> int:
    """Batches of each device in one step of the optimizer.

    Raises:
        ValueError: The devices' batches do not divide the global one.

    >>> accumulation_steps(1024, 16, 8)
    8
    """
    at_once = per_device_batch_size * devices
    if global_batch_size < 1 or global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size={global_batch_size} is no multiple of {at_once}, the examples that {devices} devices "
            f"with per_device_train_batch_size={per_device_batch_size} take at once; change one of the two."
        )
    return global_batch_size // at_once


__all__ = ["ETTTrainingArguments", "accumulation_steps"]
