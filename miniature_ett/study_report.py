"""The study's report from its results file alone: tables, figures, and which of the paper's directions hold.

- Every figure is a mean over seeds with a 95% interval (Student's t). Differences are paired by seed.
- A direction holds where the interval of the paired difference lies on the expected side of 0, does not hold where it
  lies on the other side, and is open where it includes 0. No rule looks at anything else.
- Why a direction holds or not is written by hand, in `templates/study_notes.md`.
"""

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ett.common_ett.files import write_text
from ett.evaluation_ett.common import write_json
from ett.scenes_ett import CHANCE, PROMPT_CATEGORIES, QUESTION_TYPES

from .schedule_display import format_seconds
from .study_claims import CONTROLS, PAPER_CLAIMS, PAPER_TABLE_4, PAPER_TABLE_5, Claim, judge
from .study_figures import draw_attributes, draw_trade_off
from .study_results import (
    ATTRIBUTES,
    FROZEN,
    MEASURES,
    TITLES,
    UNKNOWN,
    Results,
    format_difference,
    format_statistic,
)


def table(
    results: Results,
    ground: str,
    arms: Sequence[str],
    measures: Sequence[str],
    seeds: Sequence[int] | None = None,
    paper: dict[str, tuple[str, ...]] | None = None,
    paper_titles: Sequence[str] = (),
    with_chance: bool = False,
) -> str:
    """A Markdown table: a row an arm, a column a measure, and the paper's columns at its end."""
    rows = [["", *(MEASURES[measure].title for measure in measures), *paper_titles]]
    if with_chance:
        chances = [CHANCE.get(measure.partition(".")[2]) for measure in measures]
        rows.append(["chance", *(UNKNOWN if chance is None else f"{100 * chance:.1f}" for chance in chances)])
    for arm in arms:
        cells = [format_statistic(results.statistic(ground, arm, measure, seeds), measure) for measure in measures]
        rows.append([TITLES[arm], *cells, *(paper[arm] if paper else ())])
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claims_table(results: Results, claims: Sequence[Claim], grounds: Sequence[str], with_paper: bool) -> str:
    """A row a claim: its measure, the paper's figures, and for each ground verdict and difference."""
    rows = [["claim", "measure", *(["paper"] if with_paper else []), *(f"{ground} ground" for ground in grounds)]]
    for claim in claims:
        verdicts = []
        for ground in grounds:
            difference = results.difference(ground, claim.arm, claim.other, claim.measure)
            verdict = judge(claim, difference)
            if difference is not None:
                verdict = f"**{verdict}**: {format_difference(difference, claim.measure)}"
            verdicts.append(verdict)
        title = MEASURES[claim.measure].title.partition(",")[0]
        rows.append([claim.text, title, *([claim.paper] if with_paper else []), *verdicts])
    return markdown_table(rows).replace("---:", "---")


def count_verdicts(results: Results, claims: Sequence[Claim], ground: str) -> str:
    """Such as `9 hold, 2 do not hold, 4 are open`."""
    verdicts = [judge(claim, results.difference(ground, claim.arm, claim.other, claim.measure)) for claim in claims]
    names = {
        "holds": ("holds", "hold"),
        "does not hold": ("does not hold", "do not hold"),
        "open": ("is open", "are open"),
        "one seed": ("has one seed", "have one seed"),
        "not measured": ("is not measured", "are not measured"),
    }
    counts = [(verdicts.count(name), words) for name, words in names.items()]
    return ", ".join(f"{count} {words[count != 1]}" for count, words in counts if count)


def costs_table(results: Results, ground: str) -> str:
    """Mean minutes and largest memory of the cells of each arm."""
    rows = [["arm", "cells", "tokenizer or stage 2, min", "stage 3, min", "measuring, min", "peak memory, GiB"]]
    done = [cell for cell in results.cells.values() if cell["status"] == "done" and cell["ground"] == ground]
    for arm in dict.fromkeys(cell["arm"] for cell in sorted(done, key=lambda cell: list_index(cell["arm"]))):
        cells = [cell for cell in done if cell["arm"] == arm]

        def minutes(*stages: str, cells=cells) -> str:
            values = [cell["seconds"][stage] for cell in cells for stage in stages if stage in cell["seconds"]]
            return f"{statistics.fmean(values) / 60:.1f}" if values else UNKNOWN

        peak = max(cell["peak_memory_gb"] for cell in cells)
        stages = (minutes("tokenizer", "semantic"), minutes("chat", "generation"), minutes("measuring"))
        rows.append([arm, str(len(cells)), *stages, f"{peak:.1f}"])
    return markdown_table(rows)


def list_index(arm: str) -> int:
    """Position of an arm in the report's order; generation and longer chat stages come last."""
    names = list(TITLES)
    return names.index(arm) if arm in names else len(names)


def count_steps(settings: dict[str, Any], stage: str) -> str:
    """Steps of a stage; unknown where the study does not have it."""
    if stage not in settings["stages"]:
        return UNKNOWN
    return f"{settings['stages'][stage]['recipe']['training']['max_steps']:,}"


def write_study(contents: dict[str, Any], docs: Path, sheets: dict[str, Path] | None = None) -> Path:
    """Writes `study/results.json`, `study.md`, `study/table.md` and the figures into `docs`.

    Args:
        contents: `settings`, `versions` (a list of what cells were made with) and `cells`, as in the results file.
        sheets: Images of reconstructions by ground, to copy. Those that are in `docs` already stay.

    Returns:
        `study.md`.
    """
    folder = docs / "study"
    folder.mkdir(parents=True, exist_ok=True)
    for ground, sheet in (sheets or {}).items():
        shutil.copyfile(sheet, folder / f"sheet-{ground}.png")
    results = Results(contents["cells"])
    write_json(folder / "results.json", contents)
    draw_trade_off(results, folder / "trade-off.png")
    draw_attributes(results, folder / "attributes.png")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    counts = {ground: len(results.seeds(ground, FROZEN)) for ground in results.grounds()}
    page = environment.get_template("study.md").render(
        results=results,
        semantic_steps=count_steps(contents["settings"], f"semantic-{FROZEN}"),
        chat_steps=count_steps(contents["settings"], f"chat-{FROZEN}"),
        long_chat_steps=count_steps(contents["settings"], f"long-chat-{FROZEN}"),
        measuring=contents["settings"]["measuring"],
        versions=contents["versions"],
        quick=contents["settings"]["quick"],
        grounds=results.grounds(),
        counts=counts,
        lacks_intervals=any(len(seeds) == 1 for seeds in results.measures.values()),
        incomplete=[(name, cell) for name, cell in contents["cells"].items() if cell["status"] != "done"],
        sheets=[ground for ground in results.grounds() if (folder / f"sheet-{ground}.png").is_file()],
        control_seeds={ground: results.seeds(ground, "vq-only") for ground in results.grounds()},
        total_time=format_seconds(
            sum(sum(cell["seconds"].values()) for cell in contents["cells"].values() if cell["status"] == "done")
        ),
        table=table,
        claims_table=claims_table,
        costs_table=costs_table,
        count_verdicts=count_verdicts,
        paper_claims=PAPER_CLAIMS,
        controls=CONTROLS,
        table_4=PAPER_TABLE_4,
        table_5=PAPER_TABLE_5,
        question_measures=[f"questions.{name}" for name in QUESTION_TYPES],
        caption_measures=[f"captions.semantic.{name}" for name in ATTRIBUTES],
        chat_caption_measures=[f"captions.chat.{name}" for name in ATTRIBUTES],
        generation_measures=[f"generation.{name}" for name in PROMPT_CATEGORIES],
        notes=environment.get_template("study_notes.md").render(),
    )
    ground = next(iter(counts), "textured")
    short = environment.get_template("study_table.md").render(
        results=results, table=table, ground=ground, count=counts.get(ground, 0)
    )
    write_text(folder / "table.md", short)
    return write_text(docs / "study.md", page)


__all__ = ["write_study"]
