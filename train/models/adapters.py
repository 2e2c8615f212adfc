"""Low-rank adapters (LoRA, Hu et al. 2021) on the language model, by peft; projector and heads train in full beside
them.

An adapter's folder has peft's format: `adapter_config.json`, and `adapter_model.safetensors` with the adapters and
every part that trained in full. Frozen weights are not in it; they are those of the model that training started from.
"""

import re
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ett.common_ett.files import replacing
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.processing_ett import ETTProcessor

from ..recipes import LoraSection, Recipe
from .building import load_folder

ADAPTER_FOLDER = "adapter"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

Tensors = dict[str, torch.Tensor]


def add_adapter(model: ETTForConditionalGeneration, section: LoraSection):
    """Puts adapters beside the language model's linear maps, those of attention and MLP; text embeddings and heads
    get none. The language model's own weights are frozen, and at first the model's outputs are what they were.

    Raises:
        ValueError: `target_modules` names no linear map of the language model.
    """
    language_model = model.model.language_model
    linear = sorted({name.split(".")[-1] for name, module in language_model.named_modules() if is_linear(module)})
    if unknown := sorted(set(section.target_modules or ()) - set(linear)):
        raise ValueError(
            f"lora.target_modules names {', '.join(unknown)}; the language model's linear maps are "
            f"{', '.join(linear)}."
        )
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.rank if section.alpha is None else section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules or linear,
    )
    if getattr(model, "is_loaded_in_4bit", False):
        # peft asks the model that it adapts, and Trainer whether anything beside rounded weights can learn.
        language_model.is_loaded_in_4bit = model._hf_peft_config_loaded = True
    inject_adapter_in_model(config, language_model)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map, under whatever class; GPT-2's is a `Conv1D`."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def has_adapter(model: nn.Module) -> bool:
    """Whether [`add_adapter`] was there."""
    return any(is_adapter_weight(name) for name, _ in model.named_parameters())


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def check_adapter(recipe: Recipe):
    """Checks a recipe's `lora` section against the rest of it.

    Raises:
        ValueError: The recipe has no language model that learns, options of adapters but no rank, or asks for an
            adapter alone where no folder holds the model that it belongs to.
    """
    section = recipe.lora
    if section.rank is None:
        if section != LoraSection():
            raise ValueError("The recipe's lora section has no rank; give lora.rank, for instance 64, or remove it.")
    elif "language_model" not in recipe.train:
        raise ValueError("lora.rank is given, but language_model is not in train; add it, or remove the lora section.")
    elif not section.merge and recipe.model.path is None:
        raise ValueError(
            "lora.merge=false leaves an adapter alone, which needs the model it was trained from: start from a folder "
            "(model.path), or set lora.merge=true."
        )


def save_adapter(model: ETTForConditionalGeneration, folder: str | Path, weights: Tensors | None = None):
    """Writes everything that trains, in peft's format.

    Args:
        weights: The weights to write, by the parameters' names; by default the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = weights or trained
    config = model.model.language_model.peft_config["default"]
    targets = "|".join(sorted(config.target_modules))
    full = {name.removeprefix("model.").split(".")[0] for name in trained if not is_adapter_weight(name)}
    LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        # Names alone could match in the tokenizer, too.
        target_modules=rf"model\.language_model\..*?({targets})",
        modules_to_save=sorted(full) or None,
        base_model_name_or_path=model.name_or_path or None,
    ).save_pretrained(folder)
    tensors = {
        PEFT_PREFIX + name.replace(".default.", "."): weights[name].detach().contiguous().cpu() for name in trained
    }
    with replacing(folder / WEIGHTS_NAME) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})


def read_adapter(folder: str | Path) -> Tensors:
    """What [`save_adapter`] wrote, by the names of a model with adapters.

    Raises:
        ValueError: The folder holds no adapter.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file() or not (Path(folder) / CONFIG_NAME).is_file():
        raise ValueError(f"'{folder}' holds no adapter: {CONFIG_NAME} or {WEIGHTS_NAME} is missing.")
    return {
        re.sub(r"(\.lora_[AB])\.", r"\1.default.", name.removeprefix(PEFT_PREFIX)): tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def load_weights(model: ETTForConditionalGeneration, weights: Tensors):
    """Fills a model with adapters; what is not among the weights stays as it is.

    Raises:
        ValueError: The model has no place for some of them, or they lack some of its adapters'.
    """
    own = model.state_dict()
    unfit = [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]
    unfit += [name for name in own if is_adapter_weight(name) and name not in weights]
    if unfit:
        raise ValueError(_misfit(unfit))
    model.load_state_dict(weights, strict=False)


def merge_adapter(model: ETTForConditionalGeneration):
    """Adds the adapters to the language model's weights, in place, and takes them out: what is left needs no peft."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.model.language_model.peft_config


def merged(model: ETTForConditionalGeneration, adapter: str | Path) -> ETTForConditionalGeneration:
    """The model with an adapter merged in by peft, of whatever type peft can merge.

    Args:
        adapter: Folder of an adapter that peft or a run of training wrote.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    try:
        with_adapter = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        names = re.findall(r"size mismatch for (\S+):", str(error))
        if not names:
            raise ValueError(f"'{adapter}' cannot be loaded: {' '.join(str(error).split())}") from error
        raise ValueError(_misfit(names)) from error
    own = {_file_name(name) for name in with_adapter.state_dict()}
    with safetensors.safe_open(Path(adapter) / WEIGHTS_NAME, framework="pt") as file:
        # With bias="all", peft writes the biases of whole modules a second time, under the adapter's name.
        given = {_file_name(name) for name in file.keys()}
    # peft leaves out what has no place, and starts anew what is missing.
    if unfit := [*(given - own), *(name for name in own - given if is_adapter_weight(name))]:
        raise ValueError(_misfit(unfit))
    model = with_adapter.merge_and_unload()
    vars(model).pop("peft_config", None)
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        # A folder of tied weights would lose one of the two.
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return model


def _file_name(name: str) -> str:
    """The name in an adapter's file of a weight in a model with the adapter `default`."""
    name = re.sub(r"(\.modules_to_save|\.original_module)?\.default(?=\.|$)", "", name)
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def _misfit(names: list[str]) -> str:
    shown = sorted(_file_name(name).removeprefix(PEFT_PREFIX) for name in names)
    return (
        f"The adapter does not fit this model in {', '.join(shown[:3])}{' and others' if len(shown) > 3 else ''}; "
        "give the model that it was trained from."
    )


def merge_folder(base: str, adapter: str | Path, output: str | Path):
    """Writes a model folder of `base` with the adapter merged in, as `PeftModel.merge_and_unload` does.

    Args:
        base: Folder or Hub name of the ETT model that the adapter was trained from.
        adapter: Folder of an adapter that peft wrote, or of a finished run's `adapter/`.
        output: New or empty folder.

    Raises:
        ValueError: The folder is taken, or the adapter cannot be read or does not fit the model.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"'{output}' holds something already; choose a new or empty folder.")
    weights = read_adapter(adapter)
    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise ValueError(f"'{adapter}' is of type {config.peft_type.value}, which adds no weights that can be merged.")
    processor = ETTProcessor.from_pretrained(base)
    draws = {"visual_head": True, "answers": False} if "visual_head.weight" in weights else {}
    model = merged(load_folder(base, **draws), adapter)
    partial = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if output.exists():
        output.rmdir()
    partial.rename(output)


__all__ = [
    "ADAPTER_FOLDER",
    "add_adapter",
    "check_adapter",
    "has_adapter",
    "is_adapter_weight",
    "load_weights",
    "merge_adapter",
    "merge_folder",
    "merged",
    "read_adapter",
    "save_adapter",
]
