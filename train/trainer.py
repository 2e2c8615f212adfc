"""One trainer for every stage.

- What a stage trains is what has `requires_grad`; what it optimises follows from its inputs: labels give the caption
  loss, `predict_codes` the generation loss, a tokenizer that learns adds alpha times equation 1.
- Generator and discriminator alternate: one shared forward pass, the generator's gradient, the discriminator's.
- Where weights are averaged (`ema_decay`), a finished model, evaluation and samples have the average.

The file reads in the order of a run: the start, the data, a step, its loss, its figures, evaluation, checkpoints.
"""

import copy
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import ModelMixin
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import has_length

from ett.common_ett.metrics import codebook_use, psnr_of
from ett.data_ett import IGNORED
from ett.data_ett.stream import PreparedStream
from ett.modeling_ett.modeling_ibq import IBQModel

from .arguments import ETTTrainingArguments
from .average import MovingAverage
from .checkpointing.checkpoints import CheckpointFolder, newest_checkpoint
from .checkpointing.finite import gradients_of
from .checkpointing.guard import StepGuard
from .checkpointing.interruption import shield_workers
from .models.adapters import has_adapter, load_weights, read_adapter, save_adapter
from .monitoring.board import BoardCallback
from .monitoring.figures import Throughput, learning_rates, mean_by_name, norms_of_shares
from .monitoring.gradient_path import recording_gradient_path, warn_of_closed_path
from .monitoring.samples import SamplesCallback
from .monitoring.unlogged import Unlogged
from .muon import MuonAdamW, hidden_matrices, split_for_muon
from .objective.discriminator import PatchDiscriminator
from .objective.vq_loss import VQLoss
from .optimizers import clip_by_part, gradient_norms, parameter_groups
from .parts import model_parts
from .sharding import DeferredStep, check_sharding, keep_full_precision, reduce_unused_parameters, require_shards
from .stream_loader import ReportingCollator, StreamLoader, StreamProgressCallback

REPORTED = ("names", "skipped")
"""What is in a batch for reports alone, and does not reach the model."""


class ETTTrainer(Trainer):
    """Trains an [`IBQModel`] by equation 1, or an [`ETTForConditionalGeneration`] by equation 3 and its special cases.

    Batches hold `pixel_values` for a tokenizer; for ETT also `input_ids`, `attention_mask` and `labels`, or
    `predict_codes` for image generation, and `image_codes` in place of `pixel_values` where the tokenizer is frozen.

    Evaluation with `bf16_full_eval` or `fp16_full_eval` leaves tokenizers in float32: in half precision other codes
    would be chosen.

    Args:
        discriminator: The adversary to start from, by default a new one. Only where a tokenizer learns and has one.

    Attributes:
        vq_loss ([`VQLoss`], *optional*): Equation 1, where a tokenizer learns.
        adversary ([`Adversary`], *optional*): That of `vq_loss`.
        average ([`MovingAverage`], *optional*): The moving average, where weights are averaged.
        stream_loader ([`StreamLoader`], *optional*): The batches, where the data are a stream.
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
        args = copy.copy(args)
        if self.is_tokenizer:
            # These cast the whole model. An ETT model keeps its tokenizer in float32; a tokenizer alone is all cast.
            args.bf16_full_eval = args.fp16_full_eval = False
        self.max_grad_norm = args.max_grad_norm
        if args.part_max_grad_norms:
            # Gradients are clipped here, by part, and not by transformers.
            args.max_grad_norm = 0.0
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
        self.vq_loss = VQLoss(self.vision_tokenizer, args, discriminator) if self.tunes_tokenizer else None
        self.adversary = self.vq_loss and self.vq_loss.adversary
        self.average = None if args.ema_decay is None else MovingAverage(args.ema_decay)
        self.checkpoints = CheckpointFolder(args, self.accelerator.wait_for_everyone)
        self.guard = StepGuard(args)
        self.throughput = Throughput(self)
        self.unlogged = Unlogged(self, self.num_codes)
        self.stream_loader: StreamLoader | None = None
        self._skipped: dict[str, str] = {}
        self._shown: tuple[torch.Tensor, torch.Tensor] | None = None
        self._norm_before_clipping: torch.Tensor | None = None
        self._warned_of_closed_path = False
        self._add_callbacks()

    def _add_callbacks(self):
        self.add_callback(_BeginningCallback(self._begin))
        self.add_callback(self.guard)
        if isinstance(self.train_dataset, PreparedStream):
            # The stream itself goes on where it was: no batch is to be read and thrown away.
            self.args.ignore_data_skip = True
            self.add_callback(StreamProgressCallback())
        if self.average is not None:
            self.add_callback(self.average)
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(BoardCallback())
        if self.args.sample_steps:
            self.add_callback(SamplesCallback(self))
        self.add_callback(self.unlogged)
        self.add_callback(self.throughput)

    @property
    def interrupted_by(self) -> int:
        """Number of the signal that ended training early, or 0. All processes have the same."""
        return self.guard.interrupted_by

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The model's parameters by part."""
        return model_parts(self.accelerator.unwrap_model(self.model))

    def gradients(self) -> dict[str, list[torch.Tensor]]:
        """A step's gradients by part, before the optimizer uses them; where they are shared out among processes, this
        one's shares."""
        if self.is_deepspeed_enabled:
            return self.accelerator.deepspeed_engine_wrapped.gradients()
        return {part: gradients_of(parameters) for part, parameters in self.parts().items()}

    def skipped(self) -> dict[str, str]:
        """Rows that were skipped by all processes and their workers, by name, and why. All processes have to ask."""
        own = self._skipped if self.stream_loader is None else self.stream_loader.skipped
        return {name: reason for each in gather_object([own]) for name, reason in each.items()}

    # The start

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint is True and (newest := newest_checkpoint(self.args.output_dir)):
            resume_from_checkpoint = str(newest)
        self._resumed_from = resume_from_checkpoint or None
        self.guard.interrupted_by = 0
        with self.guard.interruption:
            return super().train(resume_from_checkpoint, **kwargs)

    def _begin(self):
        """Once model and optimizer are where they train and as their checkpoint left them."""
        checkpoint = self._resumed_from
        if self.args.should_save:
            self.checkpoints.clear(checkpoint, self.state)
        # A resumed run logs and saves as often as it is told now.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.is_deepspeed_enabled:
            self.accelerator.deepspeed_engine_wrapped = DeferredStep(self.deepspeed)
        if self.is_fsdp_enabled:
            reduce_unused_parameters(self.model)
        if self.average is not None:
            self.average.start(self.model)
            if checkpoint is not None:
                self.average.load(checkpoint)
        if self.adversary is not None:
            self.adversary.prepare(self.state.max_steps, checkpoint)
        if self.stream_loader is not None and checkpoint is not None:
            self.stream_loader.load(checkpoint)
        self.unlogged.checkpoint = checkpoint

    def _run_epoch(self, **kwargs) -> None:
        # From a run's last checkpoint, transformers would take one more step, and begin a stream's epochs for ever.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model_parts(self.accelerator.unwrap_model(model)), self.args)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            if self.args.muon_rate_factor is not None:
                optimizer_class = MuonAdamW
                groups = split_for_muon(groups, hidden_matrices(model), self.args.muon_rate_factor)
            self.optimizer = optimizer_class(groups, **kwargs, weight_decay=self.args.weight_decay)
        return self.optimizer

    # The data

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        args = self.args
        if isinstance(self.train_dataset, PreparedStream):
            loader = StreamLoader.of_run(self.train_dataset, self.data_collator, self._train_batch_size, args)
            self.stream_loader = loader
        else:
            if has_length(self.train_dataset):
                args.check_samples(len(self.train_dataset))
            collator = self.data_collator
            self.data_collator = ReportingCollator(collator)
            loader = super().get_train_dataloader()
            self.data_collator = collator
        shield_workers(loader)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of a step, and the labels in all of them and in all processes, by which losses are
        divided; counts the step's images."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.tunes_tokenizer or self.is_fsdp_enabled:
            images = [batch.get("pixel_values", batch.get("image_codes", ())) for batch in batches]
            self._num_images = self._sum(map(len, images))
        if any("predict_codes" in batch for batch in batches):
            num_items = self._sum(self._num_codes(batch) for batch in batches)
        return batches, num_items

    def _sum(self, counts: Iterable[int]) -> torch.Tensor:
        """A sum over micro-batches and processes, of shape `()`."""
        return self.accelerator.reduce(torch.tensor(sum(counts), device=self.args.device), reduction="sum")

    def _num_codes(self, batch: dict[str, Any]) -> int:
        """Codes of a batch's images, which come as such or as pixels."""
        if "image_codes" in batch:
            return batch["image_codes"].numel()
        count, _, height, width = batch["pixel_values"].shape
        factor = self.vision_tokenizer.spatial_factor
        return count * (height // factor) * (width // factor)

    # A step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """The generator's half of the alternation, then the discriminator's, on the same reconstructions. Gradients
        of both accumulate over micro-batches."""
        self.guard.watch.begin(inputs.get("names", []))
        self._skipped |= inputs.get("skipped", {})
        inputs = without_reports(inputs)
        self.throughput.count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.watch.add("loss", loss)
        shown, self._shown = self._shown, None
        if shown is not None:
            for name, value in self.adversary.learn(*shown, self._share(shown[0])).items():
                self._record(name, value)
        if self.accelerator.sync_gradients:
            if self.is_fsdp_enabled:
                self._drop_unused_gradients(inputs)
            self._check_gradients()
            self._clip_gradients()
            if self.is_deepspeed_enabled:
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

    def _check_gradients(self):
        """Raises [`NonFiniteLossError`] where a loss or a gradient is not finite. Gradients that overflow in float16
        are left to the scaler, which leaves out the step."""
        gradients = {part: gradients_of(parameters) for part, parameters in self._adversary_parts().items()}
        if self.accelerator.scaler is None:
            gradients |= self.gradients()
        self.guard.check_step(self.state.global_step + 1, gradients)

    def _clip_gradients(self):
        """Records the norms of the parts' gradients, and clips them where parts have limits of their own; otherwise
        transformers clips."""
        limits, logs = self.args.part_max_grad_norms, self._logs_this_step()
        if not (limits or logs):
            return
        # The optimizer has not undone the scale of float16 yet.
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        if self.is_deepspeed_enabled:
            norms = norms_of_shares(self.gradients())
        else:
            norms = gradient_norms(self.parts(), scale)
        if logs:
            for part, norm in norms.items():
                self._record(f"grad_norm/{part}", norm)
        if limits:
            self._norm_before_clipping = torch.stack(list(norms.values())).norm()
            clip_by_part(self.parts(), limits, self.max_grad_norm, scale)

    # Its loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """Equation 1 for a tokenizer. For an ETT model equation 2, on text or codes, plus `alpha` times equation 1
        where its tokenizer learns: equation 3."""
        with self._recording_gradient_path():
            if self.is_tokenizer:
                outputs = model(inputs["pixel_values"])
            else:
                outputs = model(
                    **inputs,
                    num_items_in_batch=num_items_in_batch,
                    return_reconstruction=self.tunes_tokenizer and model.training,
                    detach_codebook_embeds=not self.args.caption_gradient_to_tokenizer,
                    skip_logits=True,
                    use_cache=False,
                )
        loss = None
        if not self.is_tokenizer:
            loss, name = outputs.loss, "drawing_loss" if "predict_codes" in inputs else "caption_loss"
            self._record(name, self._mean_loss(loss, inputs, num_items_in_batch))
            if num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        reconstruction = outputs.sample if self.is_tokenizer else outputs.reconstruction
        if reconstruction is not None:
            vq_loss = self._reconstruction_loss(inputs["pixel_values"], reconstruction.float(), outputs.quantized)
            loss = vq_loss if loss is None else loss + self.args.alpha * vq_loss
        return (loss, outputs) if return_outputs else loss

    def _mean_loss(self, loss: torch.Tensor, inputs: dict[str, Any], num_items: torch.Tensor | None) -> torch.Tensor:
        """The loss as a mean over this micro-batch, for the log."""
        if num_items is None:
            return loss
        if "predict_codes" in inputs:
            return loss * num_items / self._num_codes(inputs)
        return loss * num_items / inputs["labels"][:, 1:].ne(IGNORED).sum().clamp(min=1)

    def _reconstruction_loss(self, pixels: torch.Tensor, reconstruction: torch.Tensor, quantized) -> torch.Tensor:
        """Equation 1, as this micro-batch's share of the step. Keeps what the discriminator is to learn from."""
        training, step = self.model.training, self.state.global_step
        loss, figures = self.vq_loss(pixels, reconstruction, quantized, step, training)
        for name, value in figures.items():
            self._record(name, value)
        if training:
            self.unlogged.code_counts += torch.bincount(quantized.codes.flatten(), minlength=self.num_codes)
            if self.adversary is not None and self.adversary.learns_at(step):
                judged = self.args.critics_batch_size
                self._shown = pixels[:judged], reconstruction[:judged].detach()
        return loss * self._share(pixels)

    def _share(self, pixels: torch.Tensor) -> float | torch.Tensor:
        """What a mean over a micro-batch's images counts in the step's mean over all; gradients are averaged over
        processes."""
        return len(pixels) * self.accelerator.num_processes / self._num_images if self.model.training else 1.0

    # Its figures

    def _record(self, name: str, value: torch.Tensor):
        if self.model.training:
            self.unlogged.values[name].append(value.detach())
            self.guard.watch.add(name, value.detach())

    def _recording_gradient_path(self) -> AbstractContextManager[None]:
        """Measures the path of gradients to the encoder in the last micro-batch before a log."""
        learns = self.tunes_tokenizer and self.model.training
        if learns and self.accelerator.sync_gradients and self._logs_this_step():
            return recording_gradient_path(self.vision_tokenizer.quantize, self._record)
        return nullcontext()

    def _logs_this_step(self) -> bool:
        return (self.state.global_step + 1) % self.state.logging_steps == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was recorded since the last log, in all processes: every loss as a mean, PSNR, and use of the
        codebook."""
        if self.interrupted_by and "train_runtime" in logs:
            # An interrupted run is not at its end, of which the summary would be.
            return
        if any(name.startswith("eval_") for name in logs):
            return super().log(logs, start_time)
        own = {name: torch.stack(values).mean().item() for name, values in self.unlogged.values.items()}
        self.unlogged.values.clear()
        recorded = mean_by_name(gather_object([own]))
        if "squared_error_loss" in recorded:
            recorded["psnr"] = psnr_of(torch.tensor(recorded["squared_error_loss"])).item()
            usage, perplexity = codebook_use(self.accelerator.reduce(self.unlogged.code_counts))
            recorded |= {"codebook_usage": usage, "codebook_perplexity": perplexity}
            self.unlogged.code_counts.zero_()
        if not self._warned_of_closed_path and self.is_world_process_zero():
            self._warned_of_closed_path = warn_of_closed_path(recorded)
        if "learning_rate" in logs:
            if self._norm_before_clipping is not None:
                recorded["grad_norm"] = self._norm_before_clipping.item()
            recorded.update(learning_rates(self.optimizer))
            if self.adversary is not None:
                recorded["learning_rate/discriminator"] = self.adversary.optimizer.param_groups[0]["lr"]
            recorded.update(self.throughput.take())
        super().log({**logs, **recorded}, start_time)

    # Evaluation

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it, the model has the moving average's weights, where there is one."""
        return nullcontext() if self.average is None else self.average.exchanged()

    def evaluation_loop(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        return super().prediction_step(model, without_reports(inputs), *args, **kwargs)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """
        Raises:
            NonFiniteLossError: A weight is NaN or infinite: the last checkpoint stays the last.
            CheckpointError: The checkpoint could not be written.
        """
        parts = self.parts() | self._adversary_parts()
        if self.average is not None:
            parts["average"] = list(self.average.weights.values())
        self.guard.check_weights(self.state.global_step, parts)
        if self.checkpoints.has(self.state.global_step):
            return
        with self.checkpoints.writing(self.state) as folder:
            super()._save_checkpoint(model, trial)
            if self.args.save_only_model:
                return
            if self.average is not None:
                self.average.save(folder, self.args.should_save)
            if self.adversary is not None and self.args.should_save:
                self.adversary.save(folder)
            if self.stream_loader is not None:
                self.stream_loader.save(folder)
            self.unlogged.save(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with_adapter = has_adapter(self.model)
        if not (with_adapter or isinstance(self.model, ModelMixin)):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            if with_adapter:
                save_adapter(self.model, output_dir, state_dict)
            else:
                self.model.save_pretrained(output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_adapter(self.model) and not self.is_fsdp_enabled:
            load_weights(self.model, read_adapter(resume_from_checkpoint))
        elif isinstance(self.model, ModelMixin):
            self.model.load_state_dict(type(self.model).from_pretrained(resume_from_checkpoint).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        """Loads the weights of the best checkpoint, their moving average and their discriminator. Transformers looks
        for files that tokenizers and adapters do not have, and knows of no average."""
        best = self.state.best_model_checkpoint
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not is_sharded and (has_adapter(self.model) or isinstance(self.model, ModelMixin)):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()
        if self.average is not None:
            self.average.load(best)
        if self.adversary is not None:
            self.adversary.load_weights(best)

    def _adversary_parts(self) -> dict[str, list[nn.Parameter]]:
        return {} if self.adversary is None else {"discriminator": list(self.adversary.discriminator.parameters())}


class _BeginningCallback(TrainerCallback):
    """Calls `begin` when training begins, before the callbacks after it."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin()


def without_reports(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch as the model takes it."""
    return {name: value for name, value in inputs.items() if name not in REPORTED}


__all__ = ["ETTTrainer"]
