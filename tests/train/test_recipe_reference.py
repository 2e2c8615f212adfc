"""docs/recipes.md has every field of a recipe, as the code has it."""

from dataclasses import fields
from pathlib import Path

import yaml

from ett.train.arguments import ETTTrainingArguments
from ett.train.planning.recipe_reference import recipe_reference
from ett.train.recipes import RECIPES, DataSection, LoraSection, ModelSection

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def lines_of(heading: str) -> dict[str, str]:
    """The lines of the tables below a heading, by field."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def test_the_page_is_current():
    command = "python -m ett.train.planning.recipe_reference > docs/recipes.md"
    assert PAGE.read_text(encoding="utf-8") == recipe_reference(), f"the page is out of date: {command}"


def test_the_page_has_every_field_of_the_sections():
    for heading, section in (("model", ModelSection), ("data", DataSection), ("lora", LoraSection)):
        assert {item.name for item in fields(section)} <= lines_of(heading).keys()


def test_the_page_has_every_training_field_that_a_recipe_of_the_package_sets():
    names = {name for path in RECIPES.glob("*.yaml") for name in yaml.safe_load(path.read_text())["training"]}
    transformers_names = {item.name for item in fields(ETTTrainingArguments)}
    assert names <= transformers_names and names <= lines_of("training").keys()


def test_a_line_has_type_default_and_meaning():
    assert lines_of("lora")["rank"] == (
        "| `rank` | a whole number from 1 to 65536, or null | `null` | Rank of the adapters; null for none, so that "
        "all weights of the language model learn. |"
    )
    assert lines_of("model")["num_vq_embeddings"] == (
        "| `num_vq_embeddings` | a whole number above 0 | `131072` | Codebook size K. |"
    )
    assert lines_of("data")["near_duplicates"].startswith("| `near_duplicates` | `distance`: a whole number (`4`) |")
    assert "| `1` |" in lines_of("training")["save_total_limit"]
