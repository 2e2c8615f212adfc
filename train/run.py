"""Runs a recipe: model, data and trainer from its sections, and a model folder at the end."""

import dataclasses
import logging
import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ett.common_ett.files import read_fields, remove_unfinished, replacing, write_json
from ett.data_ett import ETTCollator, InMemoryDataset, PreparedDataset, PreparedStream
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor, ETTProcessor

from .arguments import ETTTrainingArguments
from .checkpointing.checkpoints import CheckpointError, newest_checkpoint
from .checkpointing.folders import (
    RECIPE_NAME,
    RECORD_NAME,
    WORK_FOLDER,
    FolderLock,
    check_data_size,
    check_output_folder,
    write_data_size,
)
from .checkpointing.interruption import TrainingInterrupted
from .consistency import check_recipe, settled_recipe
from .examples import Examples, Stream, build_examples, describe_data
from .models.adapters import (
    ADAPTER_FOLDER,
    add_adapter,
    check_adapter,
    has_adapter,
    load_weights,
    merge_adapter,
    save_adapter,
)
from .models.building import build_model, changes_codebook, check_visual_embedding, load_model, set_fit
from .models.codebook import count_codes, resize_codebook
from .models.quantization import check_quantization
from .monitoring.progress import FiguresProgressCallback
from .objective.starting_point import find_discriminator, passed_on_discriminator, save_discriminator
from .parts import train_only
from .recipes import Recipe, load_recipe
from .sharding import find_deepspeed_config, whole_weights
from .tokenized_data import check_tokenized_data
from .trainer import ETTTrainer

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "lpips")


def run_recipe(
    name: str,
    overrides: list[str] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains a stage.

    The output folder receives the model, its processor and `training.json`, which records how it was made; below it,
    `training/` holds the recipe, checkpoints, TensorBoard's curves and samples. A finished folder of the same
    recipe is left as it is.

    Args:
        name: Recipe of the package, or a YAML file.
        overrides: `section.field=value`.
        output_dir: By default the recipe's name with `ett-` before it.
        resume: Go on from the newest complete checkpoint in the output folder, if there is one.
        progress: Show progress bars.
        callbacks: Further callbacks of the trainer.

    Returns:
        The output folder.

    Raises:
        ValueError: The recipe, the data or the folder cannot be used.
        CheckpointError: A checkpoint or the model could not be written.
        NonFiniteLossError: A loss, a gradient or a weight is NaN or infinite.
        TrainingInterrupted: SIGTERM, SIGUSR1 or Ctrl-C (SIGINT) came; a checkpoint was written, from which the same
            call goes on.
        KeyboardInterrupt: Ctrl-C came a second time, or before the first step.
    """
    recipe = load_recipe(name, overrides)
    check_recipe(recipe)
    check_adapter(recipe)
    check_quantization(recipe)
    output_dir = Path(output_dir or f"ett-{Path(name).stem}")
    if check_output_folder(output_dir, recipe, resume):
        logger.warning("%s holds a finished model of this recipe already.", output_dir)
        return output_dir
    with FolderLock(output_dir / WORK_FOLDER) as lock:
        _run(recipe, recipe.title or Path(name).stem, output_dir, lock, resume, progress, callbacks)
    return output_dir


def _run(
    recipe: Recipe,
    title: str,
    output_dir: Path,
    lock: FolderLock,
    resume: bool,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
):
    work = output_dir / WORK_FOLDER
    resolved = dataclasses.asdict(recipe)
    checkpoint = newest_checkpoint(work) if resume else None
    seed = recipe.training.get("seed", 0)
    check_visual_embedding(recipe)
    check_tokenized_data(recipe)
    examples = build_examples(recipe, seed)
    args = training_arguments(recipe, work, seed)
    if not recipe.data.streaming:
        args.check_samples(len(examples))
    size = ("shards", examples.num_shards) if recipe.data.streaming else ("samples", len(examples))
    if checkpoint is not None:
        check_data_size(work, *size)

    set_seed(seed)
    model, processor = build_model(recipe, examples)
    settled = settled_recipe(recipe, model)
    settled.data = dataclasses.replace(recipe.data, fit=set_fit(recipe, processor))
    if not recipe.learns.is_of_tokenizer:
        model.config.answers = not recipe.learns.predicts_codes
    if recipe.learns.predicts_codes:
        model.keep_image_sampling()
    discriminator_start = find_discriminator(recipe, args)
    kept_discriminator = discriminator_start.path if discriminator_start else passed_on_discriminator(recipe)
    has_other_codebook = changes_codebook(recipe, model)
    train_dataset = build_dataset(recipe, examples, model, processor, seed, progress)
    if has_other_codebook:
        model = change_codebook(model, recipe, train_dataset, args, checkpoint is not None, progress)
    if recipe.lora.rank is not None:
        add_adapter(model, recipe.lora)
    parts = train_only(model, recipe.train)

    # Every process has found the folder fit before the first writes into it.
    PartialState().wait_for_everyone()
    if args.should_save:
        lock.claim()
        work.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output_dir)
        with replacing(work / RECIPE_NAME) as temporary:
            temporary.write_text(yaml.safe_dump(resolved, sort_keys=False))
        if checkpoint is None:
            write_data_size(work, *size)
    trainer = ETTTrainer(
        model=model,
        args=args,
        discriminator=discriminator_start and discriminator_start.load(),
        train_dataset=train_dataset,
        data_collator=build_collator(recipe, processor),
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress:
        trainer.add_callback(FiguresProgressCallback(title))
    for callback in callbacks:
        trainer.add_callback(callback)
    if args.should_save and checkpoint is None and discriminator_start and discriminator_start.warning:
        logger.warning("%s", discriminator_start.warning)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.interrupted_by:
        stopped = TrainingInterrupted(trainer.interrupted_by, trainer.state.global_step)
        if args.should_save:
            logger.warning("%s", stopped)
        raise stopped
    skipped = trainer.skipped()
    data_filters = filters_report(trainer, examples)
    weights = whole_weights(trainer)
    if trainer.args.should_save:
        record = {
            "kind": recipe.learns.kind,
            "recipe": dataclasses.asdict(settled),
            "seed": seed,
            "steps": trainer.state.global_step,
            "seconds": time.monotonic() - start,
            "versions": library_versions(),
            "data": describe_data(recipe.data),
            "weights": "raw" if trainer.average is None else "ema",
            "parts": {part: {"parameters": count, "trained": trained} for part, (count, trained) in parts.items()},
            "data_filters": data_filters,
            "skipped_images": {**getattr(train_dataset, "skipped", {}), **skipped},
            "results": [],
            "history": trainer.state.log_history,
        }
        if trainer.vq_loss is not None and trainer.vq_loss.perceptual is not None:
            record["lpips_backbone"] = "pretrained" if args.perceptual_pretrained else "random"
        if record["skipped_images"]:
            logger.warning("%d images could not be read and were skipped.", len(record["skipped_images"]))
        finish_folder(trainer, output_dir, record, recipe, weights, kept_discriminator)
    PartialState().wait_for_everyone()


def training_arguments(recipe: Recipe, work: Path, seed: int) -> ETTTrainingArguments:
    """The recipe's `training` section, with the settings that follow from the machine. The order of the data depends
    on the seed alone, so that stages which differ in what they train see the same."""
    has_accelerator = torch.accelerator.is_available()
    defaults = {
        "seed": seed,
        "data_seed": seed,
        "save_total_limit": 1,
        "report_to": "tensorboard",
        "use_cpu": not has_accelerator,
        "dataloader_pin_memory": has_accelerator,
    }
    given = dict(recipe.training)
    if given.get("deepspeed") is not None:
        given["deepspeed"] = find_deepspeed_config(given["deepspeed"])
    try:
        return ETTTrainingArguments(output_dir=str(work), **{**defaults, **given})
    except TypeError as error:
        raise ValueError(f"The recipe's training section cannot be used: {error}") from error


# Data


def build_dataset(
    recipe: Recipe,
    examples: Examples | Stream,
    model: IBQModel | ETTForConditionalGeneration,
    processor: ETTProcessor | ETTImageProcessor,
    seed: int,
    progress: bool = True,
) -> PreparedDataset | InMemoryDataset | PreparedStream:
    """The examples as the trainer takes them."""
    prepared = prepare_examples(recipe, examples, processor, seed)
    if not recipe.data.in_memory:
        return prepared
    has_codes = recipe.learns.has_images and not recipe.learns.is_of_tokenizer
    frozen = has_codes and "vision_tokenizer" not in recipe.train
    return InMemoryDataset(prepared, model.model.vision_tokenizer.eval() if frozen else None, progress=progress)


def prepare_examples(
    recipe: Recipe, examples: Examples | Stream, processor: ETTProcessor | ETTImageProcessor, seed: int
) -> PreparedDataset | PreparedStream:
    """The examples as numbers, which are made when they are asked for.

    Raises:
        ValueError: None of the first examples can be used.
    """
    prepared = PreparedDataset(
        examples,
        recipe.task,
        processor,
        seed,
        recipe.data.prompt_dropout,
        recipe.data.max_length,
        recipe.data.independent_turns,
    )
    prepared.check()
    return PreparedStream(examples, prepared) if recipe.data.streaming else prepared


def build_collator(recipe: Recipe, processor: ETTProcessor | ETTImageProcessor) -> ETTCollator:
    """What makes batches of a recipe's prepared examples."""
    return ETTCollator(
        pad_token_id=getattr(getattr(processor, "tokenizer", None), "pad_token_id", None) or 0,
        predicts_codes=recipe.learns.predicts_codes,
        packed_length=recipe.data.max_length if recipe.data.packing else None,
    )


def filters_report(trainer: ETTTrainer, examples: Examples | Stream) -> list[dict[str, Any]]:
    """What each filter of the data has seen and removed, in all processes."""
    if trainer.stream_loader is None:
        return examples.filters_report()
    return examples.filters_report(gather_object(trainer.stream_loader.positions))


# Starting points


def change_codebook(
    tokenizer: IBQModel,
    recipe: Recipe,
    dataset: PreparedDataset | InMemoryDataset,
    args: ETTTrainingArguments,
    is_resumed: bool,
    progress: bool = True,
) -> IBQModel:
    """The tokenizer with a codebook of the recipe's size. Nothing is counted for a run that is resumed, since its
    checkpoint's codes take the place of these."""
    section = recipe.model
    counts = torch.zeros(tokenizer.config.num_vq_embeddings, dtype=torch.long)
    if not is_resumed and PartialState().is_main_process:
        counts = count_codes(
            tokenizer.to(args.device), dataset, section.codebook_images, args.train_batch_size, progress
        )
    # All processes split the same codes.
    counts = broadcast(counts.to(args.device)).cpu()
    return resize_codebook(tokenizer, section.codebook_size, counts, args.seed)


# Folders


def finish_folder(
    trainer: ETTTrainer,
    output_dir: Path,
    record: dict[str, Any],
    recipe: Recipe,
    weights: dict[str, torch.Tensor] | None = None,
    kept_discriminator: Path | None = None,
):
    """Writes the model beside the run and moves it in, the record last: a folder with a record is complete. Adapters
    are merged, and kept in a folder of their own, or are all that the folder holds.

    Args:
        weights: Where the model is in shards, all of its weights.
        kept_discriminator: File of the discriminator that the folder gets where the run has trained none.

    Raises:
        CheckpointError: The disk is full, for instance.
    """
    partial = output_dir / WORK_FOLDER / "final"
    with trainer.averaged_weights():
        if weights is not None:
            model = model_of(weights, trainer.model, recipe)
        elif recipe.model.load_in_4bit and recipe.lora.merge:
            model = in_full_precision(trainer.model, recipe)
        else:
            model = trainer.model
        try:
            if recipe.lora.merge and has_adapter(model):
                save_adapter(model, partial / ADAPTER_FOLDER)
                merge_adapter(model)
            if has_adapter(model):
                save_adapter(model, partial)
            else:
                model.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
            record["discriminator"] = save_discriminator(
                partial, trainer.adversary, trainer.state.global_step, kept_discriminator
            )
        except (OSError, SafetensorError) as error:
            message = trainer.checkpoints.describe_failure(partial, error)
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(message) from error
    for path in partial.iterdir():
        shutil.rmtree(output_dir / path.name, ignore_errors=True)
        os.replace(path, output_dir / path.name)
    shutil.rmtree(partial)
    write_record(output_dir, record)


def model_of(
    weights: dict[str, torch.Tensor], sharded: torch.nn.Module, recipe: Recipe
) -> ETTForConditionalGeneration:
    """The model in one piece that has these weights, with what trains as in the one in shards."""
    # Transformers would cut it, too, while ZeRO-3's settings are known.
    unset_hf_deepspeed_config()
    model = ETTForConditionalGeneration(sharded.config)
    if recipe.lora.rank is not None:
        add_adapter(model, recipe.lora)
    train_only(model, recipe.train)
    model.load_state_dict(weights)
    model.generation_config = sharded.generation_config
    return model


def in_full_precision(model: ETTForConditionalGeneration, recipe: Recipe) -> ETTForConditionalGeneration:
    """The model that training started from, never rounded, with what trained beside the rounded one."""
    whole = load_model(recipe.model, dtype=torch.float32)
    add_adapter(whole, recipe.lora)
    train_only(whole, recipe.train)
    load_weights(whole, {name: value for name, value in model.named_parameters() if value.requires_grad})
    return whole


def read_record(folder: str | Path) -> dict[str, Any]:
    """How a finished model was made: what `training.json` holds.

    Raises:
        ValueError: It is damaged.
    """
    return read_fields(Path(folder) / RECORD_NAME)


def write_record(folder: str | Path, record: dict[str, Any]):
    """Writes `training.json`."""
    write_json(Path(folder) / RECORD_NAME, record)


def library_versions() -> dict[str, str]:
    """Versions of Python and of what the results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


__all__ = ["library_versions", "read_record", "run_recipe", "write_record"]
