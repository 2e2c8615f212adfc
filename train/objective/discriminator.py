"""The adversary of tokenizer training: a PatchGAN discriminator with hinge loss and LeCAM regularization."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

DISCRIMINATOR_NAME = "discriminator.safetensors"
"""File of a discriminator, in a checkpoint and in a finished folder."""

FIRST_WEIGHT = "main.0.weight"


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image real or reconstructed (PatchGAN, Isola et al. 2017).

    The running means that LeCAM (Tseng et al. 2021) compares with are buffers, so they are saved with the weights.

    Args:
        width (`int`): Channels after the first layer; they double with each further one, up to eight times.
        num_layers (`int`): Layers that halve the resolution.
        lecam_decay (`float`): Decay of the running means.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3, lecam_decay: float = 0.999):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, num_layers + 1):
            following = width * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(channels, following, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(following),
                nn.LeakyReLU(0.2),
            ]
            channels = following
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.lecam_decay = lecam_decay
        self.register_buffer("lecam_real", torch.zeros(()))
        self.register_buffer("lecam_fake", torch.zeros(()))
        # The means before the present step, and the sums of its micro-batches so far. A checkpoint has neither: it is
        # written between two steps.
        self._lecam_step: tuple[torch.Tensor, torch.Tensor] | None = None
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(batch_size, 3, H, W)` in `[-1, 1]` to logits `(batch_size, 1, rows, columns)`, high where real."""
        return self.main(pixels)

    def lecam_regularization(
        self, real_logits: torch.Tensor, fake_logits: torch.Tensor, share: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """Updates the running means and returns the squared excess of the logits over the other side's mean.

        The means move once per optimizer step, by the mean logits of all its micro-batches and processes. Each
        micro-batch compares with the means that the step would leave if it ended with this micro-batch. With one
        micro-batch per step this is the reference's order: update, then compare.
        [`~PatchDiscriminator.start_lecam_step`] begins the next step.

        Args:
            real_logits, fake_logits (`torch.Tensor`): Logits of real and reconstructed images, of any shape.
            share (`float`, defaults to 1.0): Weight of this process's micro-batch in the step's mean, times the number
                of processes. The weights of a step sum to 1.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        with torch.no_grad():
            sums = torch.stack([real_logits.mean(), fake_logits.mean(), real_logits.new_ones(())])
            sums = sums.to(self.lecam_real) * share
            if dist.is_initialized():
                dist.all_reduce(sums.div_(dist.get_world_size()))
            if self._lecam_step is None:
                before = torch.stack([self.lecam_real, self.lecam_fake])
            else:
                before, former = self._lecam_step
                sums = former + sums
            self._lecam_step = before, sums
            # Divided by the shares so far, the means never depend on how many micro-batches are still to come.
            means = torch.lerp(before, sums[:2] / sums[2], 1 - self.lecam_decay)
            self.lecam_real.copy_(means[0])
            self.lecam_fake.copy_(means[1])
        return (
            F.relu(real_logits - self.lecam_fake).square().mean()
            + F.relu(self.lecam_real - fake_logits).square().mean()
        )

    def start_lecam_step(self):
        """Makes the running means, as they are now, those that the next optimizer step starts from."""
        self._lecam_step = None


def load_discriminator(path: str | Path, width: int, num_layers: int) -> PatchDiscriminator:
    """A discriminator from a file: one of a finished folder, of a checkpoint or of `ett convert-tokenizer`.

    Raises:
        ValueError: There is no such file, or its tensors are not those of a discriminator of this size.
    """
    check_discriminator(path, width, num_layers)
    discriminator = PatchDiscriminator(width=width, num_layers=num_layers)
    discriminator.load_state_dict(safetensors.torch.load_file(path))
    return discriminator


def check_discriminator(path: str | Path, width: int, num_layers: int):
    """Compares the names and shapes in a file with those of a discriminator of this size; no tensor is read.

    Raises:
        ValueError: There is no such file, or its tensors are others.
    """
    found = _shapes(path)
    with torch.device("meta"):
        expected = PatchDiscriminator(width=width, num_layers=num_layers).state_dict()
    misfits = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in found or name not in expected or tuple(expected[name].shape) != found[name]
    )
    if misfits:
        advice = "it is no discriminator of ETT"
        if FIRST_WEIGHT in found:
            own_width, layers = _size(found)
            advice = (
                f"for this file set training.discriminator_width={own_width} and "
                f"training.discriminator_layers={layers}, or start a new one with model.discriminator=new"
            )
        raise ValueError(
            f"The discriminator '{path}' does not fit a discriminator of width {width} with {num_layers} layers in "
            f"{', '.join(misfits)}; {advice}."
        )


def discriminator_size(path: str | Path) -> tuple[int, int]:
    """Width and number of layers of the discriminator in a file; no tensor is read.

    Raises:
        ValueError: There is no such file, or it holds no discriminator.
    """
    found = _shapes(path)
    if FIRST_WEIGHT not in found:
        raise ValueError(f"The discriminator '{path}' has no tensor {FIRST_WEIGHT}; it is no discriminator of ETT.")
    return _size(found)


def _shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"The discriminator '{path}' cannot be read as a safetensors file: {error}") from error


def _size(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    return shapes[FIRST_WEIGHT][0], sum(name.endswith("running_mean") for name in shapes)


def discriminator_hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator over all patches, of shape `()`."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss of the generator, on each image's mean logit, of shape `()`."""
    return F.softplus(-fake_logits.flatten(1).mean(dim=1)).mean()


__all__ = [
    "DISCRIMINATOR_NAME",
    "PatchDiscriminator",
    "check_discriminator",
    "discriminator_hinge_loss",
    "discriminator_size",
    "generator_loss",
    "load_discriminator",
]
