"""The report of a run: one page that opens from disk without a network, and the same figures as JSON.

- The page holds everything itself: styles, charts and diagrams inline, pictures as data.
- Both files are written beside their place and then renamed, so that a reader never sees half of one.
"""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from evaluation_ett.common import write_json, write_text

from .charts import MINUS, format_number, line_chart
from .targets import Target, compare_with_targets

UNKNOWN = "\N{EN DASH}"
NO_CURVES = ("step", "epoch", "learning_rate")
"""What a history holds beside the values that the report draws as curves."""


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Writes `index.html` and `results.json` into `folder`, which is made where missing, and returns the page's path.

    Args:
        results: Plain values and, as examples, PIL images:

            quick, seed, seconds, peak_memory_gb (or None), versions {name: version}, settings {name: value};
            stages: a list of {name, title, seconds, steps, parameters (how many train), trained (names of the parts),
                history: [{step, name of a loss or measure: value, ...}]};
            reconstruction: {before, after: as `evaluate_reconstruction` gives; examples: [{original, before, after}]};
            understanding: {frozen, tuned: as `evaluate_questions` gives, for the same scenes and seed};
            captions: {frozen, tuned, chat: as `evaluate_captions` gives, for the same scenes and seed}: the first two
                of the models after stage 2, `chat` of the one after stage 3, with examples;
            drawings: as `evaluate_drawings` gives;
            unseen: {understanding: {frozen, tuned}, captions (of the chat model), drawings}, all the same for scenes
                and prompts with pairs of colour and shape that training never showed.

            "frozen" is the same model with a tokenizer that was not tuned. `results.json` holds all but the images,
            and the targets with what was reached; numbers that are not finite become null.
        folder: The report's own folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = compare_with_targets(results)
    write_json(folder / "results.json", {**results, "targets": [_as_dict(target) for target in figures]})
    return write_text(folder / "index.html", _page(results, figures))


def _page(results: dict[str, Any], figures: list[Target]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent, number=format_number, signed=_signed, duration=_duration, data_url=_data_url, amount=_amount
    )
    return environment.get_template("report.html").render(
        **results,
        targets=figures,
        scores=_scores(results["understanding"], results["unseen"]["understanding"]),
        curves={stage["name"]: _curves(stage) for stage in results["stages"]},
    )


def _scores(understanding: dict[str, Any], unseen: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a question type, and last their mean: chance, frozen, tuned, and both on unseen pairs (None where a type
    was not asked) in 0..1, and how many questions."""
    frozen, tuned = understanding["frozen"], understanding["tuned"]
    rows = [
        {
            "name": name,
            "count": score["count"],
            "chance": score["chance"],
            "frozen": frozen["types"][name]["accuracy"],
            "tuned": score["accuracy"],
            "unseen_frozen": unseen["frozen"]["types"].get(name, {}).get("accuracy"),
            "unseen_tuned": unseen["tuned"]["types"].get(name, {}).get("accuracy"),
        }
        for name, score in tuned["types"].items()
    ]
    mean = {"name": "mean of types", "chance": tuned["chance"], "frozen": frozen["mean"], "tuned": tuned["mean"]}
    mean |= {"unseen_frozen": unseen["frozen"]["mean"], "unseen_tuned": unseen["tuned"]["mean"]}
    return [*rows, {**mean, "count": sum(row["count"] for row in rows)}]


def _curves(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, last value and chart of all that the stage's history holds at two steps or more."""
    names = dict.fromkeys(name for entry in stage["history"] for name in entry if name not in NO_CURVES)
    curves = []
    for name in names:
        points = [(entry["step"], entry[name]) for entry in stage["history"] if name in entry]
        if len(points) > 1:
            label = f"{name.replace('_', ' ')} of the stage {stage['title']}"
            curves.append({"name": name.replace("_", " "), "last": points[-1][1], "chart": line_chart(points, label)})
    return curves


def _percent(share: float | None, digits: int = 1) -> str:
    return UNKNOWN if share is None else f"{100 * share:.{digits}f}%"


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def _amount(value: float | None, unit: str) -> str:
    """A target's number with its unit."""
    if value is None:
        return UNKNOWN
    if unit == "%":
        return _percent(value)
    digits, sign = {"nats": (3, "+"), "points": (1, "+")}.get(unit, (1, "")) if value else (0, "")
    return f"{value:{sign}.{digits}f} {unit}".replace("-", MINUS)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _as_dict(target: Target) -> dict[str, Any]:
    return {**vars(target), "met": target.met}


__all__ = ["write_report"]
