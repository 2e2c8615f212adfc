"""Public IBQ checkpoints to an [`IBQModel`] folder: SEED-Voken's `.ckpt` files and Emu3.5's folders.

Conversion is strict. Every size is read off the tensors; every tensor of the source is used or named as left out on
purpose, and every parameter of the model is filled, or there is an error with the names.
"""

import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ett.common_ett.files import replacing
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor

from ..objective.discriminator import PatchDiscriminator

WEIGHTS = ("ema", "raw")
EMA_PREFIX, DISCRIMINATOR_PREFIX, PERCEPTUAL_PREFIX = "model_ema.", "loss.discriminator.", "loss.perceptual_loss."
EMU_MODEL_TYPE = "Emu3p5VisionVQ"
IMAGE_SIZE = 256
NAMES_SHOWN = 8
"""Pixels a side at which the public checkpoints were trained; what images are resized to by default."""

Tensors = dict[str, torch.Tensor]


@dataclass
class Conversion:
    """What was converted.

    Args:
        model: The tokenizer.
        weights: "ema", "raw", or "only" where the source holds one kind.
        left_out: Tensors of the source that the tokenizer has no place for, by what they are.
    """

    model: IBQModel
    weights: str
    left_out: dict[str, int]

    def summary(self) -> str:
        """A few lines: sizes, parameters, codebook, which weights."""
        config = self.model.config
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        kinds = {"ema": "the moving average (EMA)", "raw": "as trained (raw)", "only": "the only ones there are"}
        side = self.model.spatial_factor
        lines = [
            f"{config.num_vq_embeddings:,} codes of width {config.vq_embed_dim}, one for {side} x {side} pixels"
            + (", compared on the unit sphere" if config.l2_normalize else ""),
            f"{parameters:,} parameters; widths {', '.join(map(str, config.block_out_channels))}; "
            f"{config.layers_per_block} blocks a level",
            f"weights: {kinds[self.weights]}",
        ]
        if self.left_out:
            lines.append(
                "left out: " + ", ".join(f"{count} tensors of {what}" for what, count in self.left_out.items())
            )
        return "\n".join(lines)


def convert_tokenizer(
    source: str | Path, output: str | Path, weights: str = "ema", discriminator: str | Path | None = None
) -> Conversion:
    """Writes the tokenizer of a public checkpoint as an [`IBQModel`] folder, with an image processor beside it.

    Args:
        source: A `.ckpt` file, or a folder with `config.json` and `model.safetensors`.
        output: A folder that does not exist yet, or is empty.
        weights: "ema" for the moving average, which published figures use; "raw" to go on training exactly. A folder
            of Emu3.5 holds one kind only.
        discriminator: A file that receives the checkpoint's discriminator, as [`PatchDiscriminator`] has its weights.

    Raises:
        ValueError: The source is no such checkpoint, something in it is missing, unknown or of another shape, or the
            output folder holds something. Nothing is written then.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}.")
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"'{output}' holds something already; give a folder that does not exist.")
    if discriminator is not None and Path(discriminator).exists():
        raise ValueError(f"'{discriminator}' exists already; give a file that does not.")
    if discriminator is not None and not Path(discriminator).parent.is_dir():
        raise ValueError(f"There is no folder '{Path(discriminator).parent}' for the discriminator; make it first.")
    if source.is_dir():
        tensors, l2_normalize = read_emu_folder(source)
        conversion = build(tensors, "only", l2_normalize)
    else:
        tensors = read_checkpoint(source)
        conversion = build(tensors, weights, l2_normalize=False)
    judge = None if discriminator is None else build_discriminator(tensors)
    _write_folder(conversion.model, output)
    if judge is not None:
        _write_discriminator(judge, Path(discriminator))
    return conversion


# Sources


def read_checkpoint(path: Path) -> Tensors:
    """The tensors below `state_dict` of a Lightning checkpoint, read without unpickling anything else.

    Raises:
        ValueError: The file is not there, cannot be read, or holds objects that are no tensors.
    """
    if not path.is_file():
        raise ValueError(
            f"'{path}' is neither a .ckpt file nor a folder with config.json and model.safetensors. Download a "
            "checkpoint first, such as TencentARC/IBQ-Tokenizer-16384."
        )
    try:
        # Mapped, half of a checkpoint, the kind of weights that is left out, never gets into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' holds objects that are no tensors, which are never loaded, since that can run code: "
            f"{_first_sentence(error)}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # A damaged pickle raises almost any type.
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint; it may be cut off or no checkpoint at all: "
            f"{_first_sentence(error)}"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {
        name: value for name, value in tensors.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise ValueError(f"'{path}' holds no tensors by name; expected a checkpoint of an IBQ tokenizer.")
    return tensors


def read_emu_folder(path: Path) -> tuple[Tensors, bool]:
    """The tensors of an Emu3.5 vision tokenizer, and its flag `l2_normalize`.

    Raises:
        ValueError: A file is missing or cannot be read, or the folder is of another kind.
    """
    files = config_file, weights_file = path / "config.json", path / "model.safetensors"
    for file in files:
        if not file.is_file():
            raise ValueError(f"'{path}' has no {file.name}; expected a folder such as BAAI/Emu3.5-VisionTokenizer.")
    try:
        config = json.loads(config_file.read_text())
        if not isinstance(config, dict) or config.get("model_type") != EMU_MODEL_TYPE:
            kind = config.get("model_type") if isinstance(config, dict) else None
            raise ValueError(f"its model_type is {kind!r}, where {EMU_MODEL_TYPE!r} was expected")
        return safetensors.torch.load_file(weights_file), bool(config.get("l2_normalize", False))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"'{path}' cannot be converted: {_first_sentence(error)}.") from error


def _first_sentence(error: Exception) -> str:
    return re.split(r"\. |\n", str(error).strip())[0].rstrip(".")


# Names and sizes


def source_name(name: str, num_levels: int) -> str:
    """What IBQ's own code calls a parameter of [`IBQModel`]."""
    rules: list[tuple[str, str | Callable[[re.Match], str]]] = [
        (r"down_blocks\.(\d+)\.", r"down.\1."),
        (r"up_blocks\.(\d+)\.", lambda match: f"up.{num_levels - 1 - int(match[1])}."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"(down|up)(\.\d+)\.resnets\.", r"\1\2.block."),
        (r"(down|up)(\.\d+)\.attentions\.", r"\1\2.attn."),
        (r"(down|up)samplers\.0\.", r"\1sample."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"to_([qkv])\.", r"\1."),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def read_sizes(tensors: Tensors, shadow: Callable[[str], str]) -> dict:
    """The configuration of [`IBQModel`] that these tensors belong to.

    Args:
        shadow: From a parameter's name to that of the tensor that is converted.

    Raises:
        ValueError: A tensor that says how large the tokenizer is, is not there.
    """

    def shape(name: str) -> torch.Size:
        if shadow(name) not in tensors:
            raise ValueError(
                f"The source has no tensor '{shadow(name)}', so it is no IBQ tokenizer. Its tensors are "
                f"{list_names(list(tensors))}."
            )
        return tensors[shadow(name)].shape

    def count(template: str) -> int:
        number = 0
        while shadow(template.format(number)) in tensors:
            number += 1
        return number

    levels = max(count("encoder.down.{}.block.0.conv1.weight"), 1)
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    has_attention = [shadow(f"encoder.down.{level}.attn.0.q.weight") in tensors for level in range(levels)]
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in has_attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(has_attention)],
        "block_out_channels": widths,
        "layers_per_block": count("encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": shape("quant_conv.weight")[1],
        "num_vq_embeddings": shape("quantize.embedding.weight")[0],
        "vq_embed_dim": shape("quantize.embedding.weight")[1],
        "mid_block_add_attention": shadow("encoder.mid.attn_1.q.weight") in tensors,
    }


def build(tensors: Tensors, weights: str, l2_normalize: bool) -> Conversion:
    """The tokenizer that a checkpoint's tensors make.

    Raises:
        ValueError: Tensors are missing, unknown or of another shape; the error names some of each.
    """
    if weights == "ema" and not any(name.startswith(EMA_PREFIX) for name in tensors):
        raise ValueError("The source holds no moving average (model_ema.*); take its raw weights with --weights raw.")

    def shadow(name: str) -> str:
        return EMA_PREFIX + name.replace(".", "") if weights == "ema" else name

    model = IBQModel(**read_sizes(tensors, shadow), l2_normalize=l2_normalize)
    num_levels = len(model.config.block_out_channels)
    names = {name: source_name(name, num_levels) for name in model.state_dict()}
    missing = [shadow(source) for source in names.values() if shadow(source) not in tensors]
    left_out, unknown = sort_out(tensors, names.values(), weights)
    misshapen: dict[str, list[str]] = {}
    state = {}
    for name, parameter in model.state_dict().items():
        tensor = tensors.get(shadow(names[name]))
        if tensor is None:
            continue
        # Attention's projections, 1 x 1 convolutions there, are matrices here.
        is_projection = parameter.ndim == 2 and tensor.shape == (*parameter.shape, 1, 1)
        if tensor.shape != parameter.shape and not is_projection:
            expected, found = tuple(parameter.shape), tuple(tensor.shape)
            misshapen.setdefault(f"{found} where {expected} was expected", []).append(shadow(names[name]))
        else:
            state[name] = tensor.reshape(parameter.shape).float()
    problems = [
        f"{len(listed)} {what}: {list_names(listed)}"
        for what, listed in (("missing", missing), ("unknown", unknown))
        if listed
    ]
    problems += [
        f"{len(listed)} of another shape, {shapes}: {list_names(listed)}" for shapes, listed in misshapen.items()
    ]
    if problems:
        raise ValueError(f"The source's tensors do not make an IBQ tokenizer. {'; '.join(problems)}.")
    model.load_state_dict(state, strict=True)
    return Conversion(model, weights, left_out)


def sort_out(tensors: Tensors, sources: Iterable[str], weights: str) -> tuple[dict[str, int], list[str]]:
    """What the tokenizer has no place for: counts of what is left out on purpose, and names of what is unknown."""
    sources = set(sources)
    shadows = {EMA_PREFIX + name.replace(".", "") for name in sources}
    judge = {EMA_PREFIX + name.replace(".", "") for name in tensors if name.startswith(DISCRIMINATOR_PREFIX)}
    bookkeeping = {EMA_PREFIX + "decay", EMA_PREFIX + "num_updates"}
    left_out: dict[str, int] = {}
    unknown = []
    for name in tensors:
        if name in sources:
            what = "raw weights" if weights == "ema" else None
        elif name in shadows:
            what = None if weights == "ema" else "the moving average"
        elif name in bookkeeping:
            what = "the moving average's bookkeeping"
        elif name.startswith(DISCRIMINATOR_PREFIX) or name in judge:
            what = "the discriminator"
        elif name.startswith(PERCEPTUAL_PREFIX):
            what = "LPIPS"
        else:
            unknown.append(name)
            continue
        if what:
            left_out[what] = left_out.get(what, 0) + 1
    return left_out, sorted(unknown)


def list_names(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


# The discriminator


def build_discriminator(tensors: Tensors) -> PatchDiscriminator:
    """The discriminator of a checkpoint; LeCAM's running means, which checkpoints do not hold, start at zero.

    Raises:
        ValueError: The source holds none, or its tensors are not those of a PatchGAN discriminator.
    """
    state = {
        name.removeprefix(DISCRIMINATOR_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(DISCRIMINATOR_PREFIX)
    }
    first = state.get("main.0.weight")
    if first is None or first.ndim != 4:
        raise ValueError(
            f"The source holds no discriminator ({DISCRIMINATOR_PREFIX}main.*); leave --discriminator out."
        )
    num_layers = sum(name.endswith("running_mean") for name in state)
    judge = PatchDiscriminator(first.shape[1], first.shape[0], num_layers)
    state |= {"lecam_real": torch.zeros(()), "lecam_fake": torch.zeros(())}
    try:
        judge.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"The source's discriminator is no PatchGAN: {' '.join(str(error).split())}") from error
    return judge


# Output


def _write_folder(model: IBQModel, output: Path):
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        ETTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
        if output.exists():
            output.rmdir()
        shutil.move(folder, output)


def _write_discriminator(judge: PatchDiscriminator, path: Path):
    with replacing(path) as temporary:
        safetensors.torch.save_model(judge, str(temporary))


__all__ = ["Conversion", "convert_tokenizer"]
