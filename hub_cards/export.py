"""Writes a model's folder with its code beside it, which loads where nothing of ours is installed."""

import json
import os
import shutil
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects
from transformers.dynamic_module_utils import get_relative_import_files

from .folders import ignored_files, read_config, read_fields, require

VISION_TOKENIZER = "vision_tokenizer"
"""Subfolder in which diffusers finds the tokenizer of an ETT model."""

_HOUSE = Path(__file__).parents[1]
_TOKENIZER_CODE = ("modeling_ett/modeling_ibq.py",)
_TOKENIZER_FOLDER_CODE = (*_TOKENIZER_CODE, "processing_ett/image_processing_ett.py")
_MODEL_CODE = (
    "modeling_ett/modeling_ett.py",
    "processing_ett/processing_ett.py",
    "processing_ett/pipeline_ett.py",
)
_DRAWING_CODE = (*_MODEL_CODE, "processing_ett/text_to_image_pipeline_ett.py")

_TOKENIZER_MAP = {"AutoModel": "modeling_ibq.IBQModel"}
_IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_ett.ETTImageProcessor"}
_PROCESSOR_MAP = {"AutoProcessor": "processing_ett.ETTProcessor"}
_MODEL_MAP = {
    "AutoConfig": "configuration_ett.ETTConfig",
    "AutoModel": "modeling_ett.ETTModel",
    "AutoModelForImageTextToText": "modeling_ett.ETTForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_ett.ETTForConditionalGeneration",
}
_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_ett.ETTImageToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    },
    "image-text-to-text": {
        "impl": "pipeline_ett.ETTImageTextToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    },
    "any-to-any": {
        "impl": "pipeline_ett.ETTAnyToAnyPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    },
}
_MODEL_INDEX_NAME = "model_index.json"
_MODEL_INDEX = {
    "_class_name": ["text_to_image_pipeline_ett", "ETTTextToImagePipeline"],
    "model": ["transformers", "PreTrainedModel"],
    "processor": ["transformers", "ProcessorMixin"],
}
"""By which diffusers finds the pipeline's code; model and processor it is given. The model's own folder has an index
that needs ETT."""


def export_folder(model: str | os.PathLike, folder: str | os.PathLike, with_discriminator: bool = False) -> Path:
    """Writes a copy of a model's folder that `trust_remote_code=True` loads without ETT being installed.

    The model's files are copied, less those that are not pushed either; beside them stands the code that they need,
    and the configurations name its classes and pipelines; for a model that draws, a `model_index.json` names the
    pipeline of diffusers. An ETT model's tokenizer is written once more, for diffusers, into the subfolder
    `vision_tokenizer`, so its weights are there twice.

    Args:
        model: Folder of an ETT model or of an IBQ tokenizer, such as training leaves.
        folder: New or empty folder. It is there in whole or not at all.
        with_discriminator: Copy `discriminator.safetensors`, too, from which others can continue training.

    Returns:
        The folder.

    Raises:
        ValueError: `model` is no complete folder of such a model, or is an exported one, or lacks the discriminator
            that is asked for; `folder` is taken.
    """
    model, folder = Path(model), Path(folder).resolve()
    config = read_config(model)
    is_tokenizer = config.get("_class_name") == "IBQModel"
    processor_name = "preprocessor_config.json" if is_tokenizer else "processor_config.json"
    require(
        model,
        (model / processor_name).is_file(),
        f"no {processor_name}; save the model's processor there, with save_pretrained",
    )
    draws = config.get("visual_head", False)
    code = _sources(_TOKENIZER_FOLDER_CODE if is_tokenizer else _DRAWING_CODE if draws else _MODEL_CODE)
    names = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    ignored = [*ignored_files(model, with_discriminator), _MODEL_INDEX_NAME]
    names = list(filter_repo_objects(names, ignore_patterns=ignored))
    taken = sorted(code.keys() & set(names))
    require(model, not taken, f"{', '.join(taken)} already; give the folder that it was exported from")
    _check_target(folder)

    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / name, partial / name)
        _copy(code, partial)
        if is_tokenizer:
            _update(partial / "config.json", auto_map=_TOKENIZER_MAP)
            _update(partial / processor_name, auto_map=_IMAGE_PROCESSOR_MAP)
        else:
            _update(partial / "config.json", auto_map=_MODEL_MAP, custom_pipelines=_PIPELINES)
            image_processor = read_fields(model / processor_name).get("image_processor")
            is_given = isinstance(image_processor, dict)
            require(model, is_given, f"a {processor_name} without an image processor; save the processor there")
            image_processor |= {"auto_map": _IMAGE_PROCESSOR_MAP}
            _update(partial / processor_name, auto_map=_PROCESSOR_MAP, image_processor=image_processor)
            _save_vision_tokenizer(model, config, partial / VISION_TOKENIZER)
            if draws:
                _write(partial / _MODEL_INDEX_NAME, _MODEL_INDEX)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_target(folder: Path):
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; {folder} has to be a new or empty folder.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something already; choose a new or empty folder.")


def _sources(entries: tuple[str, ...]) -> dict[str, Path]:
    """These files and all that they import of ours, by the name that each has in a folder without packages."""
    sources = {}
    for entry in entries:
        entry = _HOUSE / entry
        for path in (entry, *map(Path, get_relative_import_files(entry))):
            if sources.setdefault(path.name, path) != path:
                raise ValueError(
                    f"{path} and {sources[path.name]} have the same name, and a model's code is one folder; rename "
                    "one of them."
                )
    return sources


def _copy(sources: dict[str, Path], folder: Path):
    for name, path in sources.items():
        shutil.copyfile(path, folder / name)


def _update(path: Path, **fields):
    """Sets fields of a file of JSON."""
    _write(path, read_fields(path) | fields)


def _write(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_vision_tokenizer(model: Path, config: dict, folder: Path):
    """Writes the tokenizer of an ETT model, with its code, as a model of its own."""
    import torch
    from safetensors import SafetensorError, safe_open

    from ett.modeling_ett.modeling_ibq import IBQModel

    prefix, weights = "model.vision_tokenizer.", {}
    try:
        for path in model.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]
                weights |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        with torch.device("meta"):
            vision_tokenizer = IBQModel.from_config(config["vq_config"])
        vision_tokenizer.load_state_dict(weights, assign=True)
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{model} is incomplete or damaged: its vision tokenizer could not be loaded ({reason:.300})."
        ) from error
    vision_tokenizer.save_pretrained(folder)
    _copy(_sources(_TOKENIZER_CODE), folder)
    _update(folder / "config.json", auto_map=_TOKENIZER_MAP)


__all__ = ["VISION_TOKENIZER", "export_folder"]
