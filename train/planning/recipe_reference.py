"""The reference of all recipe fields: `python -m ett.train.planning.recipe_reference > docs/recipes.md`.

Types and defaults are those of the code; meanings are its docstrings and help texts, and [`TRAINER_FIELDS`] for fields
of transformers.
"""

import inspect
import json
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import jinja2

from ett.data_ett.filters import FILTERS
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.modeling_ett.quantizer_ibq import IBQQuantizer

from ..arguments import ETTTrainingArguments
from ..consistency import UNUSED_ARGUMENTS
from ..field_types import describe_type, field_hints
from ..recipes import MIXTURE_FIELDS, DataSection, LoraSection, ModelSection, Recipe
from ..run import training_arguments

TRAINER_FIELDS = {
    "max_steps": "Steps of the optimizer; -1 for `num_train_epochs`.",
    "num_train_epochs": "Passes over the data, where `max_steps` is -1.",
    "per_device_train_batch_size": "Examples of a batch on each device.",
    "gradient_accumulation_steps": "Batches of a device per step; follows from `global_batch_size` where that is set.",
    "learning_rate": "Peak learning rate of the parts that `part_learning_rates` does not name.",
    "optim": "Optimizer.",
    "adam_beta1": "Decay of Adam's first moment.",
    "adam_beta2": "Decay of Adam's second moment.",
    "adam_epsilon": "Term that keeps Adam from dividing by 0.",
    "max_grad_norm": "Limit of the norm of all gradients together; 0 for none.",
    "seed": "Seed of new weights and of everything sampled.",
    "data_seed": "Seed of the order of the examples.",
    "bf16": "Compute in bfloat16 by autocast; weights stay in float32.",
    "fp16": "Compute in float16 by autocast; weights stay in float32.",
    "gradient_checkpointing": "Compute activations again in the backward pass: less memory, more time.",
    "fsdp": "Shard model and optimizer over the devices (FSDP2).",
    "deepspeed": "`zero2`, `zero3`, or a file of DeepSpeed's settings.",
    "dataloader_num_workers": "Worker processes that prepare batches; 0 for none.",
    "dataloader_drop_last": "Drop the last batch where it is not full.",
    "train_sampling_strategy": "Order of the examples.",
    "logging_steps": "Steps between two logs.",
    "save_strategy": "When checkpoints are written.",
    "save_steps": "Steps between two checkpoints.",
    "save_total_limit": "Checkpoints to keep; null for all.",
    "report_to": "Tools that receive the curves.",
    "run_name": "Name of the run in these tools.",
}
"""Fields of transformers' `TrainingArguments` that recipes usually set, and their meanings."""


def recipe_reference() -> str:
    """The page, in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: text.replace("|", r"\|")
    sections = {"model": ModelSection, "data": DataSection, "lora": LoraSection}
    page = environment.get_template("recipes.md.jinja").render(
        about={name: summary(section) for name, section in sections.items()},
        recipe=section_rows(Recipe, ""),
        **{name: section_rows(section, f"{name}.") for name, section in sections.items()},
        vision_tokenizer=tokenizer_rows(),
        mixture_fields=[name for name in MIXTURE_FIELDS if name != "weight"],
        filters=[
            {"type": name, "fields": filter_rows(kind), "meaning": summary(kind)} for name, kind in FILTERS.items()
        ],
        training=training_rows(),
        trainer=trainer_rows(),
        refused=UNUSED_ARGUMENTS,
    )
    return page.rstrip("\n") + "\n"


def field_row(key: str, annotation: Any, default: Any, meaning: str) -> dict[str, str]:
    """A line of a table.

    Args:
        key: Path of the field in a recipe.
        default: `MISSING` for none.
    """
    shown = "" if default is MISSING else f"`{json.dumps(getattr(default, 'value', default))}`"
    name = key.rpartition(".")[2]
    return {"name": name, "type": describe_type(key, annotation), "default": shown, "meaning": meaning}


def section_rows(section: type, prefix: str) -> list[dict[str, str]]:
    """Lines of a section's fields, without sections within it."""
    meanings, hints = documented_arguments(section), field_hints(section)
    return [
        field_row(prefix + item.name, hints[item.name], default_of(item), meanings[item.name])
        for item in fields(section)
        if not is_dataclass(item.default_factory)
    ]


def tokenizer_rows() -> list[dict[str, str]]:
    """Lines of the fields of an [`IBQModel`]."""
    meanings = documented_arguments(IBQModel) | documented_arguments(IBQQuantizer)
    parameters = inspect.signature(IBQModel.__init__).parameters
    return [
        field_row(f"model.vision_tokenizer.{name}", hint, parameters[name].default, meanings[name])
        for name, hint in field_hints(IBQModel.__init__).items()
    ]


def filter_rows(kind: type) -> list[dict[str, str]]:
    """Fields of a filter; its docstring says what they mean."""
    hints = field_hints(kind)
    return [
        field_row(item.name, hints[item.name], default_of(item), "") for item in fields(kind) if item.name != "columns"
    ]


def training_rows() -> list[dict[str, str]]:
    """Lines of the fields that [`ETTTrainingArguments`] adds or changes."""
    known, hints = {item.name: item for item in fields(ETTTrainingArguments)}, field_hints(ETTTrainingArguments)
    return [
        field_row(f"training.{name}", hints[name], default_of(known[name]), known[name].metadata["help"])
        for name in inspect.get_annotations(ETTTrainingArguments)
        if name not in UNUSED_ARGUMENTS
    ]


def trainer_rows() -> list[dict[str, str]]:
    """Lines of transformers' fields, with the defaults of a run."""
    hints = field_hints(ETTTrainingArguments)
    run = training_arguments(Recipe(training={"use_cpu": True}), Path("unused"), seed=0)
    return [
        field_row(f"training.{name}", hints[name], getattr(run, name), meaning)
        for name, meaning in TRAINER_FIELDS.items()
    ]


def documented_arguments(described: type) -> dict[str, str]:
    """The meaning of each argument, as the `Args` of a docstring have it."""
    arguments = inspect.getdoc(described).partition("Args:\n")[2].split("\n\n")[0]
    meanings = {}
    for entry in re.split(r"\n(?= {4}\S)", arguments):
        names, meaning = re.fullmatch(r"([\w, ]+?)(?: \(.*?\))?: (.+)", " ".join(entry.split())).groups()
        meanings |= dict.fromkeys(names.split(", "), without_links(meaning))
    return meanings


def summary(described: type) -> str:
    """The first paragraph of a docstring."""
    return without_links(" ".join(inspect.getdoc(described).split("\n\n")[0].split()))


def without_links(text: str) -> str:
    """Names in brackets, which documentation turns into links, without the brackets."""
    return re.sub(r"\[(`[^`]+`)\](e?s\b)?", r"\1\2", text)


def default_of(item: Any) -> Any:
    """The default of a dataclass's field, or `MISSING`."""
    return item.default if item.default_factory is MISSING else item.default_factory()


if __name__ == "__main__":
    print(recipe_reference(), end="")


__all__ = ["recipe_reference"]
