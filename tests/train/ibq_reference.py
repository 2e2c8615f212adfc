"""IBQ's arithmetic, written out from its published description on tensors by their published names, and checkpoints
in its two formats, small."""

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F

CHANNELS, CHANNEL_FACTORS, BLOCKS, LATENT, CODES, DIM = 32, (1, 1, 2), 2, 24, 50, 16
ATTENTION_LEVEL = len(CHANNEL_FACTORS) - 1


def make_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Raw weights of a tokenizer with 3 levels, attention at the last one."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, given: int, made: int, size: int):
        bound = (given * size * size) ** -0.5
        state[f"{name}.weight"] = torch.randn(made, given, size, size, generator=generator) * bound
        state[f"{name}.bias"] = torch.randn(made, generator=generator) * 0.1

    def norm(name: str, width: int):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def resnet(name: str, given: int, made: int):
        norm(f"{name}.norm1", given)
        conv(f"{name}.conv1", given, made, 3)
        norm(f"{name}.norm2", made)
        conv(f"{name}.conv2", made, made, 3)
        if given != made:
            conv(f"{name}.nin_shortcut", given, made, 1)

    def attention(name: str, width: int):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int):
        resnet(f"{name}.mid.block_1", width, width)
        attention(f"{name}.mid.attn_1", width)
        resnet(f"{name}.mid.block_2", width, width)

    widths = [CHANNELS * factor for factor in CHANNEL_FACTORS]
    conv("encoder.conv_in", 3, CHANNELS, 3)
    width = CHANNELS
    for level, made in enumerate(widths):
        for block in range(BLOCKS):
            resnet(f"encoder.down.{level}.block.{block}", width, made)
            width = made
            if level == ATTENTION_LEVEL:
                attention(f"encoder.down.{level}.attn.{block}", width)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, LATENT, 3)
    conv("decoder.conv_in", LATENT, width, 3)
    middle("decoder", width)
    for level, made in reversed(list(enumerate(widths))):
        for block in range(BLOCKS + 1):
            resnet(f"decoder.up.{level}.block.{block}", width, made)
            width = made
            if level == ATTENTION_LEVEL:
                attention(f"decoder.up.{level}.attn.{block}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    conv("quant_conv", LATENT, DIM, 1)
    conv("post_quant_conv", DIM, LATENT, 1)
    state["quantize.embedding.weight"] = torch.randn(CODES, DIM, generator=generator)
    return state


class Reference:
    """Encoder, quantizer and decoder of IBQ on raw weights."""

    def __init__(self, state: dict[str, torch.Tensor], l2_normalize: bool = False):
        self.state, self.l2_normalize = state, l2_normalize

    def conv(self, name: str, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **kwargs)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def resnet(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(dim=-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.mT).view_as(x))

    def level(self, name: str, x: torch.Tensor) -> torch.Tensor:
        block = 0
        while f"{name}.block.{block}.conv1.weight" in self.state:
            x = self.resnet(f"{name}.block.{block}", x)
            if f"{name}.attn.{block}.q.weight" in self.state:
                x = self.attention(f"{name}.attn.{block}", x)
            block += 1
        return x

    def middle(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(f"{name}.mid.attn_1", self.resnet(f"{name}.mid.block_1", x))
        return self.resnet(f"{name}.mid.block_2", x)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv("encoder.conv_in", pixels, padding=1)
        for level in range(len(CHANNEL_FACTORS)):
            x = self.level(f"encoder.down.{level}", x)
            if level < len(CHANNEL_FACTORS) - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def logits(self, latents: torch.Tensor) -> torch.Tensor:
        tokens, table = latents.movedim(1, -1), self.state["quantize.embedding.weight"]
        if self.l2_normalize:
            tokens, table = F.normalize(tokens, dim=-1), F.normalize(table, dim=-1)
        return tokens @ table.T

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        table = self.state["quantize.embedding.weight"]
        table = F.normalize(table, dim=-1) if self.l2_normalize else table
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", table[codes].movedim(-1, 1)), padding=1)
        x = self.middle("decoder", x)
        for level in reversed(range(len(CHANNEL_FACTORS))):
            x = self.level(f"decoder.up.{level}", x)
            if level:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


def make_discriminator_state(width: int = 8, num_layers: int = 2) -> dict[str, torch.Tensor]:
    """A PatchGAN discriminator's tensors, by the layers' numbers in IBQ's own code."""
    state = {"main.0.weight": torch.randn(width, 3, 4, 4), "main.0.bias": torch.randn(width)}
    given = width
    for layer in range(1, num_layers + 1):
        made = width * 2**layer
        state[f"main.{3 * layer - 1}.weight"] = torch.randn(made, given, 4, 4)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"main.{3 * layer}.{name}"] = torch.rand(made)
        state[f"main.{3 * layer}.num_batches_tracked"] = torch.tensor(7)
        given = made
    last = 3 * num_layers + 2
    return state | {f"main.{last}.weight": torch.randn(1, given, 4, 4), f"main.{last}.bias": torch.randn(1)}


def write_checkpoint(
    path: Path,
    raw: dict[str, torch.Tensor],
    ema: dict[str, torch.Tensor] | None = None,
    change: Callable[[dict], None] = lambda state: None,
) -> Path:
    """A Lightning checkpoint as SEED-Voken writes them: raw weights, moving averages without dots, LPIPS and a
    discriminator."""
    judge = {f"loss.discriminator.{name}": tensor for name, tensor in make_discriminator_state().items()}
    state = raw | judge | {"loss.perceptual_loss.lin0.model.1.weight": torch.randn(1, 64, 1, 1)}
    if ema is not None:
        trained = ema | {name: tensor for name, tensor in judge.items() if name.endswith(("weight", "bias"))}
        state |= {"model_ema." + name.replace(".", ""): tensor for name, tensor in trained.items()}
        state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    change(state)
    torch.save({"epoch": 3, "global_step": 1000, "state_dict": state}, path)
    return path


def write_emu_folder(path: Path, state: dict[str, torch.Tensor], l2_normalize: bool = False) -> Path:
    """A folder as Emu3.5's vision tokenizer comes in."""
    path.mkdir()
    config = {"model_type": "Emu3p5VisionVQ", "codebook_size": CODES, "embed_dim": DIM, "l2_normalize": l2_normalize}
    (path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(state, path / "model.safetensors")
    return path
