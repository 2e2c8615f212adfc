"""Recipe fields that would have no effect, found before any work: each is an error that names the field.

A field has an effect or is an error, so that `training.json` and the model card never claim a setting that the model
does not have. Options of a part that is switched off (the size of a discriminator that no stage trains, the length of
scenes beside one's own data) are a warning, since a recipe may keep them for the stage in which the part is on.
"""

import logging
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ett.common_ett.files import read_fields
from ett.common_ett.suggestions import suggestion
from ett.data_ett.tasks import TASKS

from .arguments import ETTTrainingArguments
from .recipes import (
    CRITICS,
    NEW_MODEL,
    PARTS,
    SCENE_FIELDS,
    TRAINING_DEFAULTS,
    VQ_LOSS,
    DataSection,
    ModelSection,
    Recipe,
)

logger = logging.getLogger(__name__)

NO_EVALUATION = "a recipe has no evaluation dataset; measure the finished folder with `ett evaluate`"
ALWAYS_ON = "training ignores it"
SMALLEST_IMAGE = {"vgg": 16, "squeeze": 17, "alex": 31}
"""Pixels a side of the smallest image that a network of LPIPS takes."""

UNUSED_ARGUMENTS = {
    "label_smoothing_factor": "the caption loss is plain cross-entropy (equation 2)",
    "label_names": "the task decides what is predicted",
    "use_liger_kernel": "there are no such kernels for ETT",
    "liger_kernel_config": "there are no such kernels for ETT",
    "use_cache": ALWAYS_ON,
    "remove_unused_columns": "the collator needs every column",
    "average_tokens_across_devices": "the caption loss is a mean over the global batch",
    "optim_target_modules": "every part has its own group in the optimizer",
    "enable_jit_checkpoint": "SIGTERM, SIGUSR1 and Ctrl-C end every run with a checkpoint",
    "resume_from_checkpoint": "a run continues from its newest checkpoint, unless --no-resume is given",
    "output_dir": "the folder is given as --output-dir",
    "push_to_hub": "publish the finished folder with `ett push`",
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "publish the finished folder with `ett push`",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "local_rank"), ALWAYS_ON),
    **dict.fromkeys(
        (
            *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
            *("eval_do_concat_batches", "eval_use_gather_object", "per_device_eval_batch_size"),
            *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "load_best_model_at_end"),
            *("metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval"),
        ),
        NO_EVALUATION,
    ),
}
"""Settings of transformers that a recipe's run does not use, each with the reason or the remedy."""


def check_recipe(recipe: Recipe):
    """Checks that every field of a recipe has an effect. Of a model folder at `model.path`, `config.json` is read; a
    model on the Hub is checked by [`settled_recipe`] after it is loaded.

    Raises:
        ValueError: A field has no effect or contradicts the model, a part is unknown, or a package is missing.
    """
    if recipe.task not in TASKS:
        raise ValueError(f"The recipe's task is {recipe.task!r}; expected one of {', '.join(TASKS)}.")
    for part in recipe.train:
        if part not in PARTS:
            raise ValueError(f"train names the unknown part {part!r}.{suggestion(part, PARTS)}")
    for name, reason in _without_effect(recipe):
        raise ValueError(f"{name} has no effect here: {reason}. Remove it from the recipe.")
    _check_reporting(recipe.training.get("report_to"))
    if not recipe.learns.is_of_tokenizer and recipe.model.path is not None:
        config = _read_config(recipe.model.path)
        if config is not None:
            settled_model(recipe.model, config)
    if options := _idle_options(recipe):
        logger.warning("These fields of the recipe have no effect in this stage: %s.", ", ".join(options))


def settled_recipe(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe in which the fields that describe the model have the values of the model that training starts from.

    Raises:
        ValueError: The recipe gives another value than the model at `model.path` has, or images are too small for the
            losses of the tokenizer.
    """
    section = recipe.model
    if recipe.learns.is_of_tokenizer:
        values = {"image_size": section.of_new("image_size")}
    elif section.path is None:
        values = {name: section.of_new(name) for name in NEW_MODEL}
    else:
        values = settled_model(section, model.config.to_dict())
    if "vision_tokenizer" in recipe.train:
        _check_critics(values["image_size"], {**TRAINING_DEFAULTS, **recipe.training})
    return replace(recipe, model=replace(section, **values))


def _check_critics(image_size: int, training: dict[str, Any]):
    """Raises `ValueError` where the networks of the VQ loss take no images of this size."""
    smallest = {}
    if training["perceptual_weight"]:
        smallest["perceptual_network"] = SMALLEST_IMAGE[training["perceptual_network"]]
    if training["adversarial_weight"]:
        # Each layer halves the sides, and the last two take one pixel more.
        smallest["discriminator_layers"] = 3 * 2 ** min(training["discriminator_layers"], 32)
    for name, side in smallest.items():
        if image_size < side:
            raise ValueError(
                f"training.{name} is {training[name]!r:.100}, which takes images of at least {side} x {side} pixels; "
                f"model.image_size is {image_size}."
            )


def settled_model(section: ModelSection, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that describe the ETT model at `path`, by its configuration.

    Args:
        config: Content of the model's `config.json`.

    Raises:
        ValueError: The recipe gives another value than the model has.
    """
    found = {name: config.get(name, default) for name, default in NEW_MODEL.items()}
    for name, value in found.items():
        wanted = getattr(section, name)
        if name == "visual_head" and wanted:
            # A model without a head gets a new one.
            found[name] = True
        elif wanted is not None and wanted != value:
            remedy = (
                "remove the former, or start from a model that recipe ablation_index_alignment made"
                if name == "visual_embedding" and wanted == "index"
                else "remove the former"
            )
            raise ValueError(
                f"model.{name} is {_shown(wanted)}, but the model '{section.path}' has {_shown(value)}; {remedy}."
            )
    return found


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value!r:.100}"


def _read_config(path: str) -> dict[str, Any] | None:
    try:
        config = read_fields(Path(path) / "config.json")
    except (OSError, ValueError):
        return None
    return config if config.get("model_type") == "ett" else None


def _without_effect(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Fields that the recipe gives and no step of the run reads, with the reason."""
    yield from _model_fields(recipe)
    yield from _data_fields(recipe)
    yield from _training_fields(recipe)


def _model_fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    section = recipe.model
    reconstructs = recipe.learns.is_of_tokenizer
    if section.path is not None:
        if section.vision_tokenizer:
            yield "model.vision_tokenizer", f"the model '{section.path}' (model.path) has a tokenizer"
        if section.language_model and not reconstructs:
            yield "model.language_model", f"the model '{section.path}' (model.path) has a language model"
    if reconstructs:
        reason = "a tokenizer alone (task reconstruction) has no language model"
        for name in ("language_model", "load_in_4bit", "visual_head", "visual_embedding", "code_positions"):
            if getattr(section, name):
                yield f"model.{name}", reason
    elif section.linear_start:
        yield "model.linear_start", "only the tokenizer's own stage (task reconstruction) starts a new tokenizer"
    if section.codebook_size is None and section.codebook_images != ModelSection().codebook_images:
        yield "model.codebook_images", "the codebook keeps its size, since model.codebook_size is not given"


def _data_fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data, task, default = recipe.data, recipe.learns, DataSection()
    sources = [data.source, *((entry or {}).get("source") for entry in (data.mixture or {}).values())]
    given = [name for name in vars(default) if getattr(data, name) != getattr(default, name)]
    reasons = {}
    if "scenes" not in sources and any(sources):
        reasons["ground"] = reasons["questions_per_scene"] = "no source is the embedded scenes"
    if set(filter(None, sources)) == {"scenes"}:
        own = ("image_column", "text_column", "messages_column", "image_folder", "verify_codes")
        reasons |= dict.fromkeys(own, "the embedded scenes have neither columns nor files")
    if task.column != "messages":
        reasons["independent_turns"] = f"task {recipe.task} has no conversations"
    if not task.predicts_codes:
        reasons["prompt_dropout"] = f"task {recipe.task} has no prompts to leave out"
    if task.is_of_tokenizer:
        reasons["packing"] = reasons["max_length"] = "images alone (task reconstruction) have no tokens of text"
    if not data.streaming:
        reasons["shuffle_rows"] = "only streamed data (data.streaming=true) are mixed in a buffer"
    yield from ((f"data.{name}", reasons[name]) for name in given if name in reasons)


def _training_fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    training = recipe.training
    defaults = {
        item.name: item.default_factory() if item.default is MISSING else item.default
        for item in fields(ETTTrainingArguments)
        if item.init and not (item.default is MISSING and item.default_factory is MISSING)
    }
    for name, reason in UNUSED_ARGUMENTS.items():
        value, default = training.get(name), defaults.get(name)
        if value is not None and value != getattr(default, "value", default):
            yield f"training.{name}", reason
    tunes_tokenizer = "vision_tokenizer" in recipe.train
    for name in VQ_LOSS:
        value = training.get(name)
        is_switch = name == "caption_gradient_to_tokenizer"
        if value is None or value == defaults[name] or (not value and not is_switch):
            continue
        if not tunes_tokenizer:
            yield f"training.{name}", "the vision tokenizer is frozen, since train does not name it"
        elif recipe.learns.is_of_tokenizer and name in ("alpha", "caption_gradient_to_tokenizer"):
            yield f"training.{name}", "a tokenizer alone (task reconstruction) has no caption loss"
    optimizer = training.get("optim")
    if training.get("muon_rate_factor") is not None and optimizer is not None and not optimizer.startswith("adamw"):
        yield "training.optim", "training.muon_rate_factor chooses Muon and AdamW"
    for name in ("part_learning_rates", "part_max_grad_norms"):
        for part in training.get(name) or {}:
            if part in PARTS and part not in recipe.train and recipe.lora.rank is None:
                yield f"training.{name}.{part}", f"{part} is frozen, since train does not name it"


def _idle_options(recipe: Recipe) -> list[str]:
    """Options of parts that are switched off."""
    sources = [recipe.data.source, *((entry or {}).get("source") for entry in (recipe.data.mixture or {}).values())]
    idle = []
    if any(sources) and "scenes" not in sources:
        default = DataSection()
        idle += [f"data.{name}" for name in SCENE_FIELDS if getattr(recipe.data, name) != getattr(default, name)]
    elif recipe.task not in ("text", "chat") and recipe.data.questions_per_scene != DataSection().questions_per_scene:
        idle.append("data.questions_per_scene")
    if "vision_tokenizer" not in recipe.train:
        idle += [f"training.{name}" for name in CRITICS if recipe.training.get(name) is not None]
    return idle


def _check_reporting(report_to: str | list[str] | None):
    """Raises `ValueError` where a tool for curves is unknown or its package is missing."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    available = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"training.report_to names the unknown tool {name!r}."
                f"{suggestion(name, ['none', 'all', *sorted(INTEGRATION_TO_CALLBACK)])}"
            )
        if name not in available:
            raise ValueError(
                f"training.report_to names {name}, which is not installed: pip install {name}, or choose another, for "
                "instance training.report_to=tensorboard."
            )


__all__ = ["check_recipe", "settled_recipe"]
