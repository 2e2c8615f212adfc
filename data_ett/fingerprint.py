"""Which codes an image becomes: a digest of all that decides it, of a model in memory or of its folder alone.

It covers the tokenizer's encoding half (encoder, `quant_conv`, codebook, and the configuration's fields that change
what these compute) and what is done to an image before (size, resampling, cropping, range). Two models with the same
fingerprint give the same codes, up to the rounding of different machines.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import snapshot_download

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor

ENCODING_MODULES = ("encoder.", "quant_conv.", "quantize.")
ENCODING_FIELDS = (
    *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "latent_channels"),
    *("num_vq_embeddings", "vq_embed_dim", "norm_num_groups", "mid_block_add_attention"),
    *("patch_size", "pixel_mean", "pixel_std", "l2_normalize"),
)
WEIGHTS_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def fingerprint(tokenizer: IBQModel, image_processor: ETTImageProcessor) -> str:
    """The fingerprint, 64 hexadecimal digits, of a tokenizer in memory and of what prepares its images."""
    state = {name: tensor for name, tensor in tokenizer.state_dict().items() if name.startswith(ENCODING_MODULES)}
    return _digest(tokenizer.config, image_processor, sorted(state.items()))


def folder_fingerprint(model: str | Path, image_processor: ETTImageProcessor | None = None) -> str:
    """The fingerprint of a tokenizer's folder, or of the tokenizer in an ETT model's, from its files alone.

    Args:
        model: Folder, or name on the Hub, whose files are then downloaded.
        image_processor: By default the one in the folder.

    Raises:
        ValueError: The folder holds no such weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors"]))
    config = json.loads((folder / "config.json").read_text())
    # Fields that an ETT model's configuration leaves out have the tokenizer's defaults.
    defaults = {name: item.default for name, item in inspect.signature(IBQModel.__init__).parameters.items()}
    config = {**defaults, **config.get("vq_config", config)}
    found: dict[str, tuple[Path, str]] = {}
    for path in _weight_files(folder):
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():
                name = key.rpartition("vision_tokenizer.")[2]
                if name.startswith(ENCODING_MODULES):
                    found[name] = path, key
    if not found:
        raise ValueError(f"'{model}' holds no weights of a vision tokenizer in safetensors; name another model.")
    image_processor = image_processor or ETTImageProcessor.from_pretrained(folder)
    return _digest(config, image_processor, ((name, _read(*found[name])) for name in sorted(found)))


def preprocessing(image_processor: ETTImageProcessor) -> dict[str, Any]:
    """What is done to an image before it is encoded."""
    return {
        "size": [image_processor.size["height"], image_processor.size["width"]],
        "resample": int(image_processor.resample),
        # The name that codes have had since before there were other ways.
        "crop": "centre" if image_processor.fit == "crop" else image_processor.fit,
        "range": [-1, 1],
        "levels": 256,
    }


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS_NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (folder / name).is_file():
            return [folder / name]
    return []


def _read(path: Path, key: str) -> torch.Tensor:
    with safetensors.safe_open(path, "pt") as file:
        return file.get_tensor(key)


def _digest(
    config: dict[str, Any], image_processor: ETTImageProcessor, tensors: Iterable[tuple[str, torch.Tensor]]
) -> str:
    settings = {
        "config": {name: config[name] for name in ENCODING_FIELDS},
        "preprocessing": preprocessing(image_processor),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        # Weights of lower precision become float32 without loss.
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


__all__ = ["fingerprint", "folder_fingerprint", "preprocessing"]
