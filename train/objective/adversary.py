"""The discriminator's side of the alternation: a player with its own optimizer, schedule, clipping and start.

It stays out of the hands of whatever shards the model (DDP, FSDP2, DeepSpeed), which expect one model with one
optimizer: every process holds all of it, and gradients are averaged before its step.
"""

import math
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from transformers import get_scheduler

from ..arguments import ETTTrainingArguments
from .discriminator import DISCRIMINATOR_NAME, PatchDiscriminator, discriminator_hinge_loss, generator_loss

STATE_NAME = "discriminator_optimizer.pt"


class Adversary:
    """
    Args:
        discriminator ([`PatchDiscriminator`]): Its weights, in float32.
        args ([`ETTTrainingArguments`]): Those of `discriminator_*` and `lecam_weight`; where they say nothing, the
            generator's.
    """

    def __init__(self, discriminator: PatchDiscriminator, args: ETTTrainingArguments):
        self.discriminator = discriminator.to(args.device)
        self.args = args

    def prepare(self, max_steps: int, checkpoint: str | Path | None):
        """Makes optimizer and schedule for a run of `max_steps`, as the folder of a checkpoint left them if given."""
        args = self.args
        # A run that ended within a step leaves the step's sums behind.
        self.discriminator.start_lecam_step()
        if checkpoint is not None:
            safetensors.torch.load_model(self.discriminator, Path(checkpoint) / DISCRIMINATOR_NAME)
        elif dist.is_initialized():
            for tensor in self.discriminator.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=args.discriminator_learning_rate, betas=(0.5, 0.9)
        )
        steps = max(1, max_steps - args.discriminator_start_step)
        schedule, warmup_steps = args.discriminator_lr_scheduler_type, args.get_warmup_steps(steps)
        self.scheduler = get_scheduler(schedule, self.optimizer, warmup_steps, steps)
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / STATE_NAME, weights_only=True, map_location="cpu")
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])

    def save(self, folder: str | Path):
        """Writes all that [`~Adversary.prepare`] goes on from."""
        self.save_weights(folder)
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        torch.save(state, Path(folder) / STATE_NAME)

    def save_weights(self, folder: str | Path):
        """Writes the discriminator's weights and buffers, LeCAM's running means among them."""
        safetensors.torch.save_model(self.discriminator, str(Path(folder) / DISCRIMINATOR_NAME))

    def load_weights(self, folder: str | Path):
        """Loads what [`~Adversary.save_weights`] wrote."""
        safetensors.torch.load_model(self.discriminator, str(Path(folder) / DISCRIMINATOR_NAME))

    def learns_at(self, step: int) -> bool:
        """Whether the discriminator learns in a step, counted from 0."""
        return step >= self.args.discriminator_start_step

    def counts_at(self, step: int) -> bool:
        """Whether the generator's loss has the adversarial part in a step: not while the discriminator warms up."""
        return step >= self.args.discriminator_start_step + self.args.discriminator_warmup_steps

    def fool(self, reconstruction: torch.Tensor, training: bool = True) -> torch.Tensor:
        """The generator's loss, of shape `()`; the discriminator's weights get no gradient from it.

        Args:
            reconstruction (`torch.Tensor` of shape `(batch_size, 3, H, W)`): In `[-1, 1]`.
        """
        self.discriminator.train(training).requires_grad_(False)
        loss = generator_loss(self.discriminator(reconstruction))
        self.discriminator.requires_grad_(True)
        return loss

    def learn(self, pixels: torch.Tensor, reconstruction: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
        """Adds the gradient of a micro-batch, which is `share` of a step, and returns figures for the log.

        Args:
            pixels, reconstruction (`torch.Tensor` of shape `(batch_size, 3, H, W)`): Real and false, without graph.
        """
        self.discriminator.train()
        real_logits, fake_logits = self.discriminator(pixels), self.discriminator(reconstruction)
        hinge = discriminator_hinge_loss(real_logits, fake_logits)
        lecam = self.discriminator.lecam_regularization(real_logits, fake_logits, share)
        ((hinge + self.args.lecam_weight * lecam) * share).backward()
        return {
            "discriminator_loss": hinge,
            "lecam": lecam,
            "real_logits": real_logits.mean(),
            "fake_logits": fake_logits.mean(),
        }

    def step(self) -> torch.Tensor:
        """Moves the weights by the gradients of all processes. Returns their norm before clipping."""
        parameters = list(self.discriminator.parameters())
        if dist.is_initialized():
            gradients = [parameter.grad for parameter in parameters]
            together = nn.utils.parameters_to_vector(gradients)
            dist.all_reduce(together.div_(dist.get_world_size()))
            nn.utils.vector_to_parameters(together, gradients)
        norm = nn.utils.clip_grad_norm_(parameters, self.args.discriminator_max_grad_norm or math.inf)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.discriminator.start_lecam_step()
        return norm


def adaptive_weight(fidelity_loss: torch.Tensor, adversarial_loss: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """How many times the adversarial loss balances the fidelity of the reconstruction at the decoder's last layer
    (VQGAN, Esser et al. 2021, equation 7): the ratio of the norms of their gradients there, at most 10,000."""
    norms = [
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
        for loss in (fidelity_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


__all__ = ["Adversary", "adaptive_weight"]
