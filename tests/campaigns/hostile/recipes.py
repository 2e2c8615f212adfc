"""Recipes: wrong types, unknown fields, alias bombs and hostile numbers, up to the plan of a run."""

from collections.abc import Iterator
from typing import Any

import yaml
from numpy.random import Generator

from ett import train
from ett.train.recipes import RECIPES

from .calls import run_command
from .isolation import Place
from .mutations import hostile_value, mutated, mutated_bytes, pick

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
"""Twelve lists of which each holds the one before ten times: a few hundred bytes, and 10^11 items."""

FIELDS = (
    *("title: *a11\n", "train: *a11\n", "data: {mixture: *a11}\n", "training: {optim_args: *a11}\n", "model: *a11\n"),
    "lora: {target_modules: *a11}\n",
)
BROKEN = (
    *("", "\t", "---\n---\n", "- a", "a", "[" * 10_000, "{" * 10_000, "a: &a *a", "&a [*a]", "a: &a {b: *a}"),
    *("!!python/object/apply:os.system [id]", "title: !!binary x", "title: !!timestamp x", "\ufeffa: 1", "a: 1\na: 2"),
    *("train: &t [*t]", "model: &m {vision_tokenizer: *m}", "%YAML 9.9\n---\na: 1", "a: 1e999999", "? a\n? b"),
    *("a: 0x" + "f" * 9999, "training: {<<: [1]}"),
)
INTEGERS = (1, 2, 3, 7, 100, 2**16, 2**31, 2**53)
FLOATS = (1e-30, 1e-9, 0.1, 0.5, 0.999, 1.0, 3.0, 1e9, 1e30)
TRAINING_NUMBERS = (
    *("per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps", "max_steps", "seed"),
    *("num_train_epochs", "warmup_steps", "save_steps", "logging_steps", "sample_steps", "critics_batch_size"),
    *("discriminator_width", "discriminator_layers", "discriminator_start_step", "muon_rate_factor", "peak_flops"),
    *("max_grad_norm", "adam_epsilon", "dataloader_num_workers", "save_total_limit"),
)
DATA_NUMBERS = ("length", "max_length", "questions_per_scene")
NAMES = ("demo_tokenizer", "demo_language", "demo_alignment", "demo_semantic", "demo_chat", "demo_gen", "lora_chat")


def recipes(rng: Generator, place: Place) -> Iterator[None]:
    """A hostile YAML file, or hostile overrides of a good one, through `ett train --dry-run`."""
    path, overrides = place.inputs / "recipe.yaml", []
    text = (RECIPES / f"{pick(rng, NAMES)}.yaml").read_text()
    values = _with_models(yaml.safe_load(text), place)
    kind = rng.random()
    if kind < 0.4:
        _set_numbers(rng, values)
        content = yaml.safe_dump(values).encode()
    elif kind < 0.65:
        content = yaml.safe_dump(mutated(rng, values)).encode()
    elif kind < 0.75:
        content = yaml.safe_dump(values).encode()
        overrides = [_override(rng, values) for _ in range(rng.integers(1, 3))]
    elif kind < 0.85:
        content = mutated_bytes(rng, yaml.safe_dump(values).encode())
    elif kind < 0.9:
        content = (BOMB + pick(rng, FIELDS)).encode()
        if rng.random() < 0.5:
            content = content.replace(b"a0:", b"title:", 1)
    else:
        content = pick(rng, BROKEN).encode()
    path.write_bytes(content)
    is_planned = rng.random() < 0.8
    yield
    if is_planned:
        run_command("train", path, *overrides, "--dry-run", "--devices", 1)
    else:
        train.load_recipe(str(path), overrides)


def _set_numbers(rng: Generator, values: dict[str, Any]):
    """Gives one or two of a recipe's numbers other values of their type, which only what follows from them refuses."""
    sections = [values["training"], values["data"], values["model"], values.get("lora") or {}]
    sections += [part for part in values["model"].values() if isinstance(part, dict)]
    numbers = [[name for name, value in part.items() if isinstance(value, (int, float))] for part in sections]
    numbers[0] += TRAINING_NUMBERS
    numbers[1] += DATA_NUMBERS
    places = [(part, name) for part, names in zip(sections, numbers, strict=True) for name in names]
    for _ in range(rng.integers(1, 3)):
        section, name = pick(rng, places)
        section[name] = pick(rng, FLOATS if isinstance(section.get(name), float) else INTEGERS)


def _with_models(values: dict, place: Place) -> dict:
    """The recipe with tiny models in the place of what former stages leave."""
    section = values["model"]
    if "path" in section:
        section["path"] = str(place.models / "ett-chat")
    if isinstance(section.get("vision_tokenizer"), str):
        section["vision_tokenizer"] = str(place.models / "ett-tokenizer")
    values["data"]["source"] = "scenes"
    return values


def _override(rng: Generator, values: dict) -> str:
    """A field of the recipe, or one beside it, with a hostile value."""
    section = pick(rng, ("model", "data", "training", "lora"))
    field = pick(rng, [*(values.get(section) or {}), "", "a", "filters.0.min_side", "mixture.a.source"])
    value = hostile_value(rng)
    return f"{section}.{field}={yaml.safe_dump(value).removesuffix('...').strip() if rng.random() < 0.8 else value}"


__all__ = ["recipes"]
