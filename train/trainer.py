"""One trainer for every stage.

- What a stage trains is what has `requires_grad`; what it optimises follows from its inputs: labels give the caption
  loss, `predict_codes` the drawing loss, a tokenizer that learns adds alpha times equation 1.
- Generator and discriminator alternate: one shared forward pass, the generator's gradient, the discriminator's.
- Where weights are averaged (`ema_decay`), a finished model, evaluation and samples have the average.
"""

import copy
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers.integrations import TensorBoardCallback

from ett.modeling_ett.modeling_ibq import IBQModel

from .arguments import ETTTrainingArguments
from .average import MovingAverage
from .checkpointing.finite import gradients_of
from .checkpointing.safety import SafeTrainer
from .models.adapters import is_adapter_weight
from .models.quantization import num_weights
from .monitoring.board import BoardCallback
from .monitoring.figures import Throughput, gradient_norm, learning_rates, norms_of_shares
from .monitoring.gradient_path import recording_gradient_path, warn_of_closed_path
from .monitoring.samples import SamplesCallback
from .monitoring.unlogged import Unlogged
from .muon import MuonAdamW, hidden_matrices, split_for_muon
from .objective.adversary import Adversary, adaptive_weight
from .objective.discriminator import PatchDiscriminator
from .objective.losses import build_perceptual_loss, reconstruction_losses
from .recipes import PARTS
from .sharding import DeferredStep, check_sharding, keep_full_precision, reduce_unused_parameters, require_shards
from .stream_loader import StreamingTrainer

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


class ETTTrainer(SafeTrainer, StreamingTrainer):
    """Trains an [`IBQModel`] by equation 1, or an [`ETTForConditionalGeneration`] by equation 3 and its special cases.

    Batches hold `pixel_values` for a tokenizer; for ETT also `input_ids`, `attention_mask` and `labels`, or
    `predict_codes` for drawing, and `image_codes` in place of `pixel_values` where the tokenizer is frozen.

    Evaluation with `bf16_full_eval` or `fp16_full_eval` leaves tokenizers in float32: in half precision other codes
    would be chosen.

    Args:
        discriminator: The adversary to start from, by default a new one. Only where a tokenizer learns and has one.
    """

    def __init__(
        self,
        model: nn.Module,
        args: ETTTrainingArguments,
        discriminator: PatchDiscriminator | None = None,
        **kwargs,
    ):
        check_sharding(model, args)
        self.is_tokenizer = isinstance(model, IBQModel)
        if self.is_tokenizer:
            # These cast the whole model. An ETT model keeps its tokenizer in float32; a tokenizer alone is all cast.
            args = copy.copy(args)
            args.bf16_full_eval = args.fp16_full_eval = False
        super().__init__(model=model, args=args, **kwargs)
        require_shards(self)
        keep_full_precision(self)
        self.vision_tokenizer = model if self.is_tokenizer else model.model.vision_tokenizer
        self.tunes_tokenizer = any(parameter.requires_grad for parameter in self.vision_tokenizer.parameters())
        self.num_codes = self.vision_tokenizer.config.num_vq_embeddings
        # For models that accept it, labels are counted over the global batch; compute_loss scales by that number.
        self.model_accepts_loss_kwargs = not self.is_tokenizer
        self.loss_is_scaled_for_ga = True
        # Evaluation, too, leaves it to compute_loss what is learned from a batch: no label is common to all stages.
        self.label_names, self.can_return_loss = [], True
        self.perceptual = self.adversary = None
        if self.tunes_tokenizer and args.perceptual_weight:
            self.perceptual = build_perceptual_loss(args.perceptual_network, args.perceptual_pretrained).to(
                args.device
            )
        if self.tunes_tokenizer and args.adversarial_weight:
            channels, width = self.vision_tokenizer.config.out_channels, args.discriminator_width
            discriminator = discriminator or PatchDiscriminator(channels, width, args.discriminator_layers)
            self.adversary = Adversary(discriminator, args)
        self._shown: tuple[torch.Tensor, torch.Tensor] | None = None
        self._warned_of_closed_path = False
        self._norms_before_clipping: dict[str, torch.Tensor] = {}
        self.average = None
        if args.ema_decay is not None:
            self.average = MovingAverage(args.ema_decay)
            self.add_callback(self.average)
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(BoardCallback())
        if args.sample_steps:
            self.add_callback(SamplesCallback(self))
        self.throughput = Throughput(self)
        self.unlogged = Unlogged(self, self.num_codes)
        self.add_callback(self.unlogged)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return model_parts(self.accelerator.unwrap_model(self.model))

    def gradients(self) -> dict[str, list[torch.Tensor]]:
        if self.is_deepspeed_enabled:
            return self.accelerator.deepspeed_engine_wrapped.gradients()
        return {part: gradients_of(parameters) for part, parameters in self.parts().items()}

    # Optimizers

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            rates = self.args.part_learning_rates or {}
            parts = model_parts(self.accelerator.unwrap_model(model))
            for name in ("part_learning_rates", "part_max_grad_norms"):
                if unknown := sorted(set(getattr(self.args, name) or {}) - set(parts)):
                    raise ValueError(f"{name} names {', '.join(unknown)}; this model's parts are {', '.join(parts)}.")
            groups = [
                {"params": trained, "lr": rates.get(part, self.args.learning_rate), "part": part}
                for part, parameters in parts.items()
                if (trained := [parameter for parameter in parameters if parameter.requires_grad])
            ]
            if not groups:
                raise ValueError("Nothing to train: every parameter of the model is frozen.")
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            if self.args.muon_rate_factor is not None:
                optimizer_class = MuonAdamW
                groups = split_for_muon(groups, hidden_matrices(model), self.args.muon_rate_factor)
            self.optimizer = optimizer_class(groups, **kwargs, weight_decay=self.args.weight_decay)
        return self.optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            self.accelerator.deepspeed_engine_wrapped = DeferredStep(self.deepspeed)
        if self.is_fsdp_enabled:
            reduce_unused_parameters(self.model)
        if self.adversary is not None:
            self.adversary.prepare(max_steps, resume_from_checkpoint)
        self.unlogged.checkpoint = resume_from_checkpoint
        return prepared

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.unlogged.save(output_dir)

    # Losses

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device):
        """Labels of a step, in all its micro-batches and processes, by which losses are divided; and its images."""
        if self.tunes_tokenizer or self.is_fsdp_enabled:
            images = [batch.get("pixel_values", batch.get("image_codes", ())) for batch in batch_samples]
            self._num_images = self._sum(map(len, images))
        if any("predict_codes" in batch for batch in batch_samples):
            return self._sum(self._num_codes(batch) for batch in batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _sum(self, counts: Iterable[int]) -> torch.Tensor:
        """A sum over micro-batches and processes, of shape `()`."""
        return self.accelerator.reduce(torch.tensor(sum(counts), device=self.args.device), reduction="sum")

    def _num_codes(self, batch: dict[str, Any]) -> int:
        """Codes of a batch's pictures, which come as such or as pixels."""
        if "image_codes" in batch:
            return batch["image_codes"].numel()
        count, _, height, width = batch["pixel_values"].shape
        factor = self.vision_tokenizer.spatial_factor
        return count * (height // factor) * (width // factor)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """The generator's half of the alternation, then the discriminator's, on the same reconstructions. Gradients
        of both accumulate over micro-batches."""
        self.throughput.count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch.add("loss", loss)
        shown, self._shown = self._shown, None
        if shown is not None:
            for name, value in self.adversary.learn(*shown, self._share(shown[0])).items():
                self._record(name, value)
        if self.accelerator.sync_gradients:
            if self.is_fsdp_enabled:
                self._drop_unused_gradients(inputs)
            self._check_step()
            if self.is_deepspeed_enabled:
                if self._logs_this_step():
                    self._record_gradient_norms(norms_of_shares(self.gradients()))
                self.accelerator.deepspeed_engine_wrapped.step()
            if shown is not None:
                self._record("grad_norm/discriminator", self.adversary.step())
        return loss

    def _drop_unused_gradients(self, inputs: dict[str, Any]):
        """Removes the zeros that FSDP2 gives to parameters that no process has used in a step, as DDP leaves them
        without a gradient: moments and weights do not decay then."""
        unused = [] if "predict_codes" in inputs else ["visual_head"]
        if not self._num_images:
            unused += ["vision_tokenizer", "index_embedding", "projector"]
        parts = self.parts()
        for parameter in itertools.chain.from_iterable(parts.get(part, ()) for part in unused):
            parameter.grad = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        if self.is_tokenizer:
            with self._recording_gradient_path():
                outputs = model(inputs["pixel_values"])
            reconstruction, loss = outputs.sample, None
        else:
            with self._recording_gradient_path():
                outputs = model(
                    **inputs,
                    num_items_in_batch=num_items_in_batch,
                    return_reconstruction=self.tunes_tokenizer and model.training,
                    detach_image_embeds=not self.args.caption_gradient_to_tokenizer,
                    skip_logits=True,
                    use_cache=False,
                )
            reconstruction, loss = outputs.reconstruction, outputs.loss
            self._record(
                "drawing_loss" if "predict_codes" in inputs else "caption_loss",
                self._mean_loss(loss, inputs, num_items_in_batch),
            )
            if num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        if reconstruction is not None:
            pixels = inputs["pixel_values"]
            vq_loss = self._vq_loss(pixels, reconstruction.float(), outputs.quantized) * self._share(pixels)
            loss = vq_loss if loss is None else loss + self.args.alpha * vq_loss
        return (loss, outputs) if return_outputs else loss

    def _share(self, pixels: torch.Tensor) -> float | torch.Tensor:
        """What a mean over a micro-batch's pictures counts in the step's mean over all; gradients are averaged over
        processes."""
        return len(pixels) * self.accelerator.num_processes / self._num_images if self.model.training else 1.0

    def _mean_loss(self, loss: torch.Tensor, inputs: dict[str, Any], num_items: torch.Tensor | None) -> torch.Tensor:
        """The loss as a mean over this micro-batch, for the log."""
        if num_items is None:
            return loss
        if "predict_codes" in inputs:
            return loss * num_items / self._num_codes(inputs)
        return loss * num_items / inputs["labels"][:, 1:].ne(-100).sum().clamp(min=1)

    def _vq_loss(self, pixels: torch.Tensor, reconstruction: torch.Tensor, quantized) -> torch.Tensor:
        """Equation 1, in float32, as a mean over the micro-batch's pictures."""
        args = self.args
        losses = reconstruction_losses(pixels, reconstruction, quantized)
        fidelity = losses["reconstruction"] + args.squared_error_weight * losses["squared_error"]
        real, fake = pixels[: args.critics_batch_size], reconstruction[: args.critics_batch_size]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(real, fake).mean()
            fidelity = fidelity + args.perceptual_weight * losses["perceptual"]
        total = fidelity + args.quantization_weight * losses["quantization"] + args.entropy_weight * losses["entropy"]
        if self.adversary is not None and self.adversary.counts_at(self.state.global_step):
            losses["adversarial"] = self.adversary.fool(fake, self.model.training)
            weight = args.adversarial_weight
            if args.adaptive_adversarial_weight and self.model.training:
                last_layer = self.vision_tokenizer.decoder.conv_out
                balance = adaptive_weight(fidelity, losses["adversarial"], last_layer)
                self._record("adversarial_balance", balance)
                weight = weight * balance
            total = total + weight * losses["adversarial"]
        if self.adversary is not None and self.model.training and self.adversary.learns_at(self.state.global_step):
            self._shown = real, fake.detach()
        for name, value in losses.items():
            self._record(f"{name}_loss", value)
        self._record("vq_loss", total)
        if self.model.training:
            self.unlogged.code_counts += torch.bincount(quantized.codes.flatten(), minlength=self.num_codes)
        return total

    # The average

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it, the model has the moving average's weights, where there is one."""
        return nullcontext() if self.average is None else self.average.exchanged()

    def evaluation_loop(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    # Logs

    def _record(self, name: str, value: torch.Tensor):
        if self.model.training:
            self.unlogged.values[name].append(value.detach())
            self._watch.add(name, value.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was recorded since the last log, in all processes: every loss as a mean, PSNR, and use of the
        codebook."""
        if any(name.startswith("eval_") for name in logs):
            return super().log(logs, start_time)
        own = {name: torch.stack(values).mean().item() for name, values in self.unlogged.values.items()}
        self.unlogged.values.clear()
        recorded = mean_by_name(gather_object([own]))
        if "squared_error_loss" in recorded:
            recorded["psnr"] = 10 * math.log10(4 / max(recorded["squared_error_loss"], 1e-10))
            recorded.update(codebook_statistics(self.accelerator.reduce(self.unlogged.code_counts)))
            self.unlogged.code_counts.zero_()
        if not self._warned_of_closed_path and self.is_world_process_zero():
            self._warned_of_closed_path = warn_of_closed_path(recorded)
        if "learning_rate" in logs:
            recorded.update(learning_rates(self.optimizer))
            if self.adversary is not None:
                recorded["learning_rate/discriminator"] = self.adversary.optimizer.param_groups[0]["lr"]
            recorded.update(self.throughput.take())
        super().log({**logs, **recorded}, start_time)

    def _clip_grad_norm(self, model: nn.Module):
        """Clips the gradients of the parts in `part_max_grad_norms` each to its own norm, and those of the others
        together to `max_grad_norm`. Returns the norm of all before clipping."""
        limits = self.args.part_max_grad_norms
        if not limits:
            return super()._clip_grad_norm(model)
        # Undoes the scale of float16, which the limits are not meant for.
        norm = self.accelerator.clip_grad_norm_(model.parameters(), math.inf)
        parts = self.parts()
        self._norms_before_clipping = {
            part: own for part, parameters in parts.items() if (own := gradient_norm(parameters)) is not None
        }
        others = [parameter for part in parts if part not in limits for parameter in parts[part]]
        groups = [*((parts[part], limit) for part, limit in limits.items()), (others, self.args.max_grad_norm)]
        for parameters, limit in groups:
            if limit:
                nn.utils.clip_grad_norm_(parameters, limit)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """Beside the norm of all gradients, records those of the parts, before clipping."""
        has_limits = bool(self.args.part_max_grad_norms)
        if has_limits and grad_norm is None:
            # Transformers clips only where max_grad_norm is above 0.
            grad_norm = self._clip_grad_norm(model)
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and has_limits and self._logs_this_step():
            self._record_gradient_norms(self._norms_before_clipping)
        elif norm is not None and self._logs_this_step() and not self.is_deepspeed_enabled:
            limit = self.args.max_grad_norm
            clipped = min(1.0, limit / (float(norm) + 1e-6)) if limit else 1.0
            norms = {part: gradient_norm(parameters) for part, parameters in model_parts(self.model).items()}
            self._record_gradient_norms({part: own / clipped for part, own in norms.items() if own is not None})
        return norm

    def _recording_gradient_path(self) -> AbstractContextManager[None]:
        """Measures the path of gradients to the encoder in the last micro-batch before a log."""
        learns = self.tunes_tokenizer and self.model.training
        if learns and self.accelerator.sync_gradients and self._logs_this_step():
            return recording_gradient_path(self.vision_tokenizer.quantize, self._record)
        return nullcontext()

    def _logs_this_step(self) -> bool:
        return (self.state.global_step + 1) % self.state.logging_steps == 0

    def _record_gradient_norms(self, norms: dict[str, torch.Tensor]):
        for part, norm in norms.items():
            self._record(f"grad_norm/{part}", norm)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        is_long = self.control.should_save or self.control.should_evaluate
        with self.throughput.paused() if is_long else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)


def mean_by_name(records: list[dict[str, float]]) -> dict[str, float]:
    """Records of several processes to one; each value is the mean over those that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: statistics.fmean(record[name] for record in records if name in record) for name in names}


def codebook_statistics(counts: torch.Tensor) -> dict[str, float]:
    """How often each code was used, `(K,)`, to the share of codes used and the perplexity (at most K)."""
    probabilities = counts.double() / counts.sum().clamp(min=1)
    return {
        "codebook_usage": (counts > 0).double().mean().item(),
        "codebook_perplexity": torch.special.entr(probabilities).sum().exp().item(),
    }


__all__ = [
    "PARTS",
    "ETTTrainer",
    "codebook_statistics",
    "model_parts",
    "train_only",
]
