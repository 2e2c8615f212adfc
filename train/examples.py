"""What a recipe's data section means: the one place where its examples are chosen."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ett.data_ett.mixture import MixedExamples
from ett.data_ett.rows import open_rows
from ett.data_ett.sources import FolderExamples, SceneExamples
from ett.data_ett.stream import DatasetShards, ExampleStream, MixedStream, SceneReader, SceneShards, TarShards
from ett.data_ett.tasks import TASKS

if TYPE_CHECKING:
    from .recipes import DataSection, Recipe

Examples = SceneExamples | FolderExamples | MixedExamples
Stream = ExampleStream | MixedStream


def build_examples(recipe: "Recipe", seed: int) -> Examples | Stream:
    """The examples of the recipe's `data` section; first rows are looked at, and no weight is loaded.

    Raises:
        ValueError: The task is unknown, there are no data, or they cannot be used as the recipe says.
    """
    if recipe.task not in TASKS:
        raise ValueError(f"The recipe's task is {recipe.task!r}; expected one of {', '.join(TASKS)}.")
    data = recipe.data
    if data.streaming:
        check_streaming(recipe)
    if not data.mixture:
        return build_source(recipe.task, data, seed)
    if data.source is not None:
        raise ValueError(
            f"The recipe has data.source ({data.source!r}) and data.mixture ({', '.join(data.mixture)}); set "
            "data.source=null, or make it one of the mixture."
        )
    weights = {name: entry.get("weight", 1.0) for name, entry in data.mixture.items()}
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or weight <= 0:
            raise ValueError(f"data.mixture.{name}.weight is {weight!r}; expected a number above 0.")
    sources = {}
    for name, entry in data.mixture.items():
        try:
            sources[name] = build_source(recipe.task, source_section(data, entry), seed)
        except ValueError as error:
            raise ValueError(f"data.mixture.{name}: {error}") from error
    return (MixedStream if data.streaming else MixedExamples)(sources, weights, seed)


def check_streaming(recipe: "Recipe"):
    """Raises `ValueError` where a recipe asks of streamed data what only data of a known length can give."""
    if recipe.training.get("max_steps", -1) <= 0:
        raise ValueError("Streamed data have no end (data.streaming=true); say how long to train: training.max_steps.")
    if recipe.data.in_memory:
        raise ValueError("Streamed data are not kept (data.streaming=true); set data.in_memory=false.")
    if recipe.model.codebook_size is not None:
        raise ValueError(
            "model.codebook_size counts codes in images from all over the data, which streamed data do not give; "
            "set data.streaming=false."
        )


def build_source(task: str, data: "DataSection", seed: int) -> Examples | Stream:
    """The examples of one source."""
    if data.source is None:
        raise ValueError(
            "This recipe needs data: give data.source=FOLDER (images with a metadata.jsonl), any dataset that "
            "datasets can load, or data.source=scenes."
        )
    if data.source == "scenes":
        if data.filters:
            raise ValueError(
                "Scenes are not filtered; remove data.filters, or in a mixture give them filters: [] of their own."
            )
        options = data.questions_per_scene, data.independent_turns, data.ground
        scenes = SceneExamples(task, seed, data.split, data.length, *options)
        if not data.streaming:
            return scenes
        return ExampleStream(SceneShards(scenes), SceneReader(scenes), seed, data.shuffle_rows)
    columns = {
        "split": data.split,
        "image_column": data.image_column,
        "text_column": data.text_column,
        "messages_column": data.messages_column,
        "image_folder": data.image_folder,
        "seed": seed,
    }
    if not data.streaming:
        return FolderExamples(data.source, task, data.filters, **columns)
    rows, reader = open_rows(data.source, task, **columns, streaming=True)
    shards = TarShards(rows) if isinstance(rows, list) else DatasetShards(rows, data.source)
    filters = reader.filters(data.filters, getattr(rows, "column_names", None))
    return ExampleStream(shards, reader, seed, data.shuffle_rows, filters)


def source_section(data: "DataSection", entry: dict[str, Any]) -> "DataSection":
    """The data section with what an entry of its mixture says in place of its own."""
    own = {key: value for key, value in entry.items() if key != "weight"}
    return replace(data, mixture=None, **own)


def describe_data(data: "DataSection") -> str:
    """The data in a sentence, or their name."""
    if data.mixture:
        return " and ".join(
            f"{describe_data(source_section(data, entry))} (weight {entry.get('weight', 1)})"
            for entry in data.mixture.values()
        )
    if data.source == "scenes":
        return f"{data.length} scenes of the embedded dataset (split {data.split}), drawn by the seed"
    return str(data.source)


__all__ = ["Examples", "Stream", "build_examples", "describe_data"]
