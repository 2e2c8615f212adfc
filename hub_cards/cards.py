"""Model cards, written from what training recorded; nothing in them is typed by hand."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData


@dataclass(frozen=True)
class CardKind:
    """What is the same for every model of one kind."""

    title: str
    library_name: str
    pipeline_tag: str
    tags: tuple[str, ...]


KINDS = {
    "tokenizer": CardKind(
        "IBQ vision tokenizer",
        "diffusers",
        "image-feature-extraction",
        ("vision-tokenizer", "vector-quantization", "ibq"),
    ),
    "chat": CardKind(
        "ETT-Chat",
        "transformers",
        "image-text-to-text",
        ("multimodal", "image-captioning", "visual-question-answering"),
    ),
    "gen": CardKind("ETT-Gen", "transformers", "text-to-image", ("multimodal", "autoregressive-image-generation")),
}

_REQUIRED = {
    "kind": str,
    "recipe": Mapping,
    "seed": int,
    "steps": int,
    "versions": Mapping,
    "seconds": (int, float),
    "data": str,
    "results": list,
}
"""Entries of a training record, by type."""

LONGEST = 1e12
"""More seconds of training than there can be."""

_OPTIONAL = {"losses": Mapping, "notes": list}
_OF_RESULT = ("task", "dataset", "split", "metric", "value")
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"


def write_card(folder: str | os.PathLike, record: Mapping) -> Path:
    """Writes `README.md` into a model's folder, with the results as metadata that the Hub reads.

    Args:
        folder: The folder that `save_pretrained` wrote.
        record: What training recorded:
            `kind` ("tokenizer", "chat" or "gen"), `recipe` (dict, shown as YAML), `seed`, `steps`, `seconds`,
            `versions` (library to version), `data` (a sentence, or the id of a dataset on the Hub),
            `results` (list of dicts with `task`, `dataset`, `split`, `metric`, `value`; may be empty);
            and where there is something to say `losses` (name to last value), `notes` (list of sentences),
            `lpips_backbone` ("pretrained" or "random") and `weights` ("ema" for their moving average, or "raw").

    Returns:
        The path of the card.

    Raises:
        ValueError: The record lacks an entry, one is of another type, or its kind or LPIPS backbone is unknown.
        FileNotFoundError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to write a model card into.")
    missing = [name for name in _REQUIRED if name not in record]
    if missing:
        raise ValueError(f"The training record for {folder} lacks {', '.join(missing)}; a card is written from these.")
    _check_types(folder, record)
    kind, backbone = record["kind"], record.get("lpips_backbone")
    if kind not in KINDS:
        raise ValueError(f"The training record for {folder} is of kind {kind!r}; expected one of {', '.join(KINDS)}.")
    if backbone not in (None, "pretrained", "random"):
        raise ValueError(
            f"The LPIPS backbone in the record for {folder} is {backbone!r}; expected pretrained or random."
        )

    card = ModelCard.from_template(
        _card_data(folder.resolve().name, KINDS[kind], record),
        template_path=str(_TEMPLATE),
        record=record,
        title=KINDS[kind].title,
        name=folder.resolve().name,
        recipe_yaml=yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True).strip(),
        duration=_duration(record["seconds"]),
        cell=_cell,
    )
    path = folder / "README.md"
    temporary = folder / f".README.md.{os.getpid()}.tmp"
    card.save(temporary)
    temporary.replace(path)
    return path


def _check_types(folder: Path, record: Mapping):
    for name, kind in {**_REQUIRED, **_OPTIONAL}.items():
        if (name in _REQUIRED or record.get(name) is not None) and not isinstance(record[name], kind):
            raise ValueError(f"The training record for {folder} has {record[name]!r:.100} as its {name}.")
    if not 0 <= record["seconds"] < LONGEST:
        raise ValueError(f"The training record for {folder} has {record['seconds']!r:.100} seconds of training.")
    for result in record["results"]:
        texts = [isinstance(result.get(name), str) for name in _OF_RESULT[:-1]] if isinstance(result, Mapping) else []
        if not texts or not all(texts) or not isinstance(result.get("value"), (int, float)):
            raise ValueError(
                f"The training record for {folder} has the result {result!r:.100}; expected {', '.join(_OF_RESULT)}."
            )


def _card_data(name: str, kind: CardKind, record: Mapping) -> ModelCardData:
    results = [
        EvalResult(
            task_type=_slug(result["task"]),
            task_name=result["task"],
            dataset_type=_slug(result["dataset"]),
            dataset_name=result["dataset"],
            dataset_split=result["split"],
            metric_type=_slug(result["metric"]),
            metric_name=result["metric"],
            metric_value=result["value"],
        )
        for result in record["results"]
    ]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", record["data"]) and not Path(record["data"]).exists()
    return ModelCardData(
        license="apache-2.0",
        library_name=kind.library_name,
        pipeline_tag=kind.pipeline_tag,
        tags=["ett", *kind.tags, "arxiv:2505.10562"],
        datasets=[record["data"]] if on_hub else None,
        model_name=name,
        eval_results=results or None,
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9/]+", "-", text.lower()).strip("-")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(hours or minutes) + [f"{seconds} s"]
    return " ".join(parts)


def _cell(value: object) -> str:
    """One cell of a Markdown table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


__all__ = ["KINDS", "CardKind", "write_card"]
