"""Recipes: wrong types, unknown fields, alias bombs and hostile numbers, up to the plan of a run."""

from collections.abc import Iterator

import yaml
from numpy.random import Generator

import train
from train.recipes import RECIPES

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
NAMES = ("demo_tokenizer", "demo_language", "demo_alignment", "demo_semantic", "demo_chat", "demo_gen", "lora_chat")


def recipes(rng: Generator, place: Place) -> Iterator[None]:
    """A hostile YAML file, or hostile overrides of a good one, through `ett train --dry-run`."""
    path, overrides = place.inputs / "recipe.yaml", []
    text = (RECIPES / f"{pick(rng, NAMES)}.yaml").read_text()
    values = _with_models(yaml.safe_load(text), place)
    kind = rng.random()
    if kind < 0.6:
        content = yaml.safe_dump(mutated(rng, values)).encode()
    elif kind < 0.7:
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
