"""The report of a run: one page that opens from disk without a network, and the same numbers as JSON.

- The page is self-contained: styles, charts and diagrams are inline, images are data URLs, and there is no script.
- Both files are written beside their place and then renamed, so that a reader never sees half of one.
"""

import base64
import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ett.common_ett.files import write_text
from ett.evaluation_ett.common import write_json
from ett.scenes_ett import PROMPT_CATEGORIES, UNSEEN_PAIRS, parse_caption

from .charts import MINUS, format_number, interval_chart, line_chart
from .verdicts import ATTRIBUTE_CHANCE, PROMPT_CHANCE, has_learned, is_at_chance, loss_change

UNKNOWN = "\N{EN DASH}"
NO_CURVES = ("step", "epoch", "learning_rate")
"""Entries of a history that are no measurements."""
GALLERY_TURNS = 2
"""Generated images of each category in the gallery."""
UNSEEN_CATEGORIES, UNSEEN_TURNS = ("colors", "color attribution"), 3
"""Categories of prompts that name pairs of colour and shape, and images of each."""
CAPTION_EXAMPLES = 6
ATTRIBUTE_NAMES = {
    "count": "number of shapes",
    "place": "places",
    "colour": "colours",
    "shape": "kinds of shape",
    "size": "sizes",
    "word": "word or number",
}
SMALLER_IS_BETTER = ("nats",)


@dataclass(frozen=True)
class Score:
    """A row of a table of scores.

    Args:
        name: Type of question, attribute of captions or category of prompts.
        accuracy, unseen: In 0..1, for test scenes and for those with unseen pairs; `None` where not measured.
        chance: In 0..1; `None` where there is no natural guess.
        count: The number of answers behind `accuracy`.
    """

    name: str
    accuracy: float | None
    chance: float | None
    count: int
    unseen: float | None

    @property
    def at_chance(self) -> bool:
        """Whether the row is marked: its accuracy is known and does not exceed chance."""
        if self.accuracy is None or self.chance is None or not self.count:
            return False
        return is_at_chance(self.accuracy, self.chance, self.count)


def write_report(results: dict[str, Any], folder: Path, study: dict[str, Any] | None = None) -> Path:
    """Writes `index.html` and `results.json` into `folder`, which is made where missing, and returns the page's path.

    Args:
        results: Plain values and, as examples, PIL images:

            quick, seed, seconds, peak_memory_gb (or None), versions {name: version}, settings {name: value};
            stages: a list of {name, title, seconds, steps, parameters (how many train), trained (names of the parts),
                history: [{step, name of a loss or measure: value, ...}]};
            reconstruction: {before, after: as `evaluate_reconstruction` gives; examples: [{original, before, after}]};
            understanding: as `evaluate_questions` gives;
            semantic_captions, captions: as `evaluate_captions` gives, of the models after stage 2 and after the chat
                stage, the latter with examples;
            generation: as `evaluate_drawings` gives;
            unseen: {understanding, captions, generation}, the same for scenes and prompts with pairs of colour and
                shape that training never showed.

            `results.json` holds all but the images, and the study; numbers that are not finite become null.
        folder: The report's own folder.
        study: The stored summary of a study of frozen against tuned tokenizers over several seeds:

            note: One or two sentences on its settings;
            rows: a list of {name, unit ("%", "nats" or "dB"), frozen, tuned, difference: {mean, low, high}, seeds,
                paper (text or None)}. Low and high bound the 95% interval, and are None for fewer than two seeds.
                Values in "%" are in 0..1. Smaller values in "nats" are better, larger values in other units.

            Without a study the page has no section on it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {**results, "study": study})
    return write_text(folder / "index.html", _page(results, study))


def _page(results: dict[str, Any], study: dict[str, Any] | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent,
        number=format_number,
        duration=_duration,
        data_url=_data_url,
        value=_value,
        interval=_interval,
        difference=_difference,
    )
    generation, unseen = results["generation"], results["unseen"]
    return environment.get_template("report.html").render(
        **results,
        best_images=_best_images(generation["examples"]),
        best_caption=_best_caption(results["captions"]["examples"]),
        right_images=sum(score["correct"] for score in generation["categories"].values()),
        gallery=_first_of_each(generation["examples"], GALLERY_TURNS),
        unseen_gallery=_first_of_each(
            [example for example in unseen["generation"]["examples"] if example["category"] in UNSEEN_CATEGORIES],
            UNSEEN_TURNS,
        ),
        unseen_pairs=[f"{color} {shape}" for color, shape in sorted(UNSEEN_PAIRS)],
        caption_examples=results["captions"]["examples"][:CAPTION_EXAMPLES],
        question_scores=_question_scores(results["understanding"], unseen["understanding"]),
        caption_scores=_caption_scores(results["captions"], unseen["captions"]),
        generation_scores=_generation_scores(generation, unseen["generation"]),
        training=[_training(stage) for stage in results["stages"]],
        study=study and _study(study),
    )


def _question_scores(understanding: dict[str, Any], unseen: dict[str, Any]) -> list[Score]:
    rows = [
        Score(name, score["accuracy"], score["chance"], score["count"], _accuracy(unseen["types"], name))
        for name, score in understanding["types"].items()
    ]
    total = Score("mean of types", understanding["mean"], understanding["chance"], _total(rows), unseen["mean"])
    return [*rows, total]


def _generation_scores(generation: dict[str, Any], unseen: dict[str, Any]) -> list[Score]:
    rows = [
        Score(name, score["accuracy"], PROMPT_CHANCE[name], score["count"], _accuracy(unseen["categories"], name))
        for name, score in generation["categories"].items()
    ]
    chance = statistics.mean(row.chance for row in rows)
    return [*rows, Score("mean of categories", generation["mean"], chance, _total(rows), unseen["mean"])]


def _caption_scores(captions: dict[str, Any], unseen: dict[str, Any]) -> list[Score]:
    """A row for each attribute of the generated captions, and last the share of captions without a mistake.

    `score_attributes` gives shares alone. The counts behind them follow from the true captions.
    """
    examples, attributes = captions["examples"], captions["attributes"]
    truths = [parse_caption(example["truth"]) for example in examples]
    shapes = sum(len(scene_shapes) for scene_shapes, _ in truths)
    found = round(shapes * (attributes["place"] or 0))
    counts = {"count": len(examples), "place": shapes, "word": sum(text is not None for _, text in truths)}
    rows = [
        Score(title, attributes[name], ATTRIBUTE_CHANCE[name], counts.get(name, found), unseen["attributes"][name])
        for name, title in ATTRIBUTE_NAMES.items()
    ]
    return [*rows, Score("wholly true", captions["accuracy"], None, len(examples), unseen["accuracy"])]


def _accuracy(scores: dict[str, Any], name: str) -> float | None:
    return scores[name]["accuracy"] if name in scores else None


def _total(rows: list[Score]) -> int:
    return sum(row.count for row in rows)


def _first_of_each(examples: Iterable[dict[str, Any]], turns: int) -> list[dict[str, Any]]:
    """The first `turns` examples of each category, turn by turn."""
    groups: dict[str, list[dict[str, Any]]] = {category: [] for category in PROMPT_CATEGORIES}
    for example in examples:
        groups[example["category"]].append(example)
    return [group[turn] for turn in range(turns) for group in groups.values() if turn < len(group)]


def _best_images(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first right image of each category, or, where none is right, the first image of each category."""
    return _first_of_each([example for example in examples if example["correct"]] or examples, 1)


def _best_caption(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """The longest caption without a mistake, or, where every caption has one, the first caption."""
    right = [example for example in examples if example["correct"]]
    return max(right, key=lambda example: len(example["caption"])) if right else examples[0]


def _training(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage with its verdict, the change of its own loss, and its curves, that of its own loss first."""
    change = loss_change(stage)
    return {
        **stage,
        "learned": has_learned(stage),
        "change": change and {**change._asdict(), "name": _words(change.name)},
        "curves": _curves(stage, first=change and change.name),
    }


def _curves(stage: dict[str, Any], first: str | None = None) -> list[dict[str, Any]]:
    """Name, last value and chart of all that the stage's history holds at two steps or more, that named `first` first.

    A stage with one loss also logs it as the total loss. Equal curves are shown once.
    """
    names = dict.fromkeys(name for entry in stage["history"] for name in entry if name not in NO_CURVES)
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in sorted(names, key=lambda name: name != first):
        points = [(entry["step"], entry[name]) for entry in stage["history"] if name in entry]
        if len(points) > 1 and points not in curves.values():
            curves[name] = points
    return [
        {
            "name": _words(name),
            "last": points[-1][1],
            "chart": line_chart(points, f"{_words(name)} of the stage {stage['title']}"),
        }
        for name, points in curves.items()
    ]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _study(study: dict[str, Any]) -> dict[str, Any]:
    """The study's rows with a verdict each, the count of each verdict, and a chart for each unit."""
    rows = [{**row, "verdict": _verdict(row)} for row in study["rows"]]
    verdicts = [row["verdict"] for row in rows]
    units = dict.fromkeys(row["unit"] for row in rows)
    return {
        "note": study["note"],
        "rows": rows,
        "counts": {verdict: verdicts.count(verdict) for verdict in ("better", "worse", "open")},
        "charts": {
            unit: interval_chart([row for row in rows if row["unit"] == unit], ("frozen", "tuned"), unit)
            for unit in units
        },
    }


def _verdict(row: dict[str, Any]) -> str:
    """What the interval of the difference says of tuning: "better", "worse", or "open" where it includes 0."""
    low, high = row["difference"]["low"], row["difference"]["high"]
    if low is None or high is None or low <= 0 <= high:
        return "open"
    return "better" if (low > 0) != (row["unit"] in SMALLER_IS_BETTER) else "worse"


def _percent(share: float | None, digits: int = 1) -> str:
    return UNKNOWN if share is None else f"{100 * share:.{digits}f}%"


def _in_unit(value: float, unit: str) -> tuple[float, int]:
    """A value as it is shown, and its digits."""
    return (100 * value, 1) if unit == "%" else (value, 3 if unit == "nats" else 2)


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return UNKNOWN
    shown, digits = _in_unit(value, unit)
    return f"{shown:.{digits}f}{'%' if unit == '%' else f' {unit}'}".replace("-", MINUS)


def _difference(value: float | None, unit: str) -> str:
    if value is None:
        return UNKNOWN
    shown, digits = _in_unit(value, unit)
    return f"{shown:+.{digits}f} {'points' if unit == '%' else unit}".replace("-", MINUS)


def _interval(estimate: dict[str, float | None], unit: str, sign: str = "") -> str:
    """The bounds of a 95% interval, with `sign` "+" for those of differences."""
    if estimate["low"] is None or estimate["high"] is None:
        return "one seed, no interval"
    bounds = []
    for bound in (estimate["low"], estimate["high"]):
        shown, digits = _in_unit(bound, unit)
        bounds.append(f"{shown:{sign}.{digits}f}".replace("-", MINUS))
    return " to ".join(bounds)


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


__all__ = ["write_report"]
