"""Figures of a run beside its losses: what it does in a second, and each part's gradient norm and learning rate."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback

from ett.data_ett import IGNORED

from ..planning.flops import StepFlops, peak_flops


class Throughput(TrainerCallback):
    """Counts what training takes in, for the log: `images_per_second` and `tokens_per_second` of all devices (text and
    image positions, without padding), `model_tflops_per_second` of a device on average and, where its peak is
    known, `mfu`, the share of it (model FLOPs utilization; see [`StepFlops`]); on CUDA `peak_memory_gib` of a device,
    the largest.

    Nothing is waited for: counts stay on the device until they are logged. Time spent on samples, checkpoints and
    evaluation does not count.

    Args:
        trainer ([`ETTTrainer`])
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.peak = trainer.args.peak_flops or peak_flops(trainer.args.device)
        self.flops: StepFlops | None = None
        self._paused_at: float | None = None
        self._restart()

    def _restart(self):
        self.since, self.lost = None, 0.0
        self.images, self.image_flops = 0, 0.0
        self.counts: list[torch.Tensor] = []

    def count(self, inputs: dict[str, Any]):
        """Takes a micro-batch into account, before it is computed."""
        if self.since is None:
            self.since = time.perf_counter()
        trainer = self.trainer
        if self.flops is None:
            discriminator = trainer.adversary and trainer.adversary.discriminator
            self.flops = StepFlops(trainer.model, trainer.vq_loss and trainer.vq_loss.perceptual, discriminator)
        codes = 0
        if "pixel_values" in inputs:
            number, _, height, width = inputs["pixel_values"].shape
            judged = min(number, trainer.args.critics_batch_size or number) if trainer.tunes_tokenizer else 0
            self.images += number
            self.image_flops += number * self.flops.of_image(height, width)
            self.image_flops += judged * self.flops.of_judged_image(height, width)
            codes = number * height * width // trainer.vision_tokenizer.spatial_factor**2
        elif "image_codes" in inputs:
            self.images += len(inputs["image_codes"])
            codes = inputs["image_codes"].numel()
        self.image_flops += codes * self.flops.of_code
        if "input_ids" in inputs:
            predicted = codes if "predict_codes" in inputs else 0
            self.counts.append(count_tokens(inputs, trainer.data_collator.pad_token_id, predicted))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within it does not count, for the figures that are not taken yet when it ends."""
        self._pause()
        yield
        self._go_on()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_evaluate:
            self._pause()

    def on_step_begin(self, args, state, control, **kwargs):
        self._go_on()

    def _pause(self):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._paused_at = time.perf_counter()

    def _go_on(self):
        if self._paused_at is not None and self.since is not None:
            self.lost += time.perf_counter() - self._paused_at
        self._paused_at = None

    def take(self) -> dict[str, float]:
        """Figures since the last call, of all processes together; nothing where there was no batch."""
        if self.since is None:
            return {}
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        seconds = now - self.since - self.lost
        counts = torch.stack(self.counts).sum(dim=0).tolist() if self.counts else (0, 0, 0, 0)
        costs = (self.flops.of_position, self.flops.of_pair, self.flops.of_label, self.flops.of_code_label)
        flops = self.image_flops + sum(count * cost for count, cost in zip(counts, costs, strict=True))
        device = self.trainer.args.device
        mine = torch.tensor([self.images, counts[0], flops], dtype=torch.float64, device=device) / seconds
        images, tokens, flops = self.trainer.accelerator.reduce(mine).tolist()
        flops /= self.trainer.accelerator.num_processes
        rates = {"images_per_second": images, "tokens_per_second": tokens, "model_tflops_per_second": flops / 1e12}
        figures = {name: value for name, value in rates.items() if value}
        if self.peak is not None:
            figures["mfu"] = flops / self.peak
        if device.type == "cuda":
            memory = torch.tensor(torch.cuda.max_memory_allocated(device) / 2**30, device=device)
            figures["peak_memory_gib"] = self.trainer.accelerator.gather(memory).max().item()
        self._restart()
        return figures


def count_tokens(inputs: dict[str, Any], pad_token_id: int, num_code_labels: int = 0) -> torch.Tensor:
    """A batch to `(4,)` of int64: positions without padding, pairs of a position and one that it sees, labels of text,
    labels that are codes. Without a mask of that shape, a token sees as many as its position says."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        lengths = mask.sum(dim=1)
        positions, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    else:
        is_token = inputs["input_ids"].ne(pad_token_id)
        positions = is_token.sum()
        pairs = ((inputs["position_ids"] + 1) * is_token).sum()
    labels = inputs["labels"].ne(IGNORED).sum() if "labels" in inputs else positions.new_zeros(())
    return torch.stack([positions, pairs, labels, positions.new_tensor(num_code_labels)])


def gradient_norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor | None:
    """Norm of all gradients together, of shape `()`, whole where they are sharded; none where there is no gradient."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def norms_of_shares(parts: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Norms by part, each of shape `()`, of gradients of which every process has its own shares. All take part."""
    squares = torch.stack([get_total_norm(shares).square() for shares in parts.values()])
    distributed.all_reduce(squares)
    return dict(zip(parts, squares.sqrt(), strict=True))


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Present learning rates by part, as `learning_rate/projector`; what Muon moves has its own, `.../muon`."""
    return {
        f"learning_rate/{group['part']}" + "/muon" * group.get("orthogonalize", False): group["lr"]
        for group in optimizer.param_groups
        if "part" in group
    }


def mean_by_name(records: list[dict[str, float]]) -> dict[str, float]:
    """Records of several processes to one; each value is the mean over those that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: statistics.fmean(record[name] for record in records if name in record) for name in names}


__all__ = [
    "Throughput",
    "count_tokens",
    "gradient_norm",
    "learning_rates",
    "mean_by_name",
    "norms_of_shares",
]
