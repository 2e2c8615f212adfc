"""The study in a few rows, frozen against tuned, for the demo's page."""

import json
from pathlib import Path
from typing import Any

from .study_claims import PAPER_CLAIMS
from .study_results import FROZEN, MEASURES, TUNED, Results

STORED_RESULTS = Path(__file__).parents[1] / "docs" / "study" / "results.json"
"""The results of the study that has been run, in a clone; an installed package does not have them."""
UNITS = {" points": "%", " nats": "nats", " dB": "dB"}


def stored_summary() -> dict[str, Any] | None:
    """The summary of [`STORED_RESULTS`]; `None` where the file is not there."""
    if not STORED_RESULTS.is_file():
        return None
    return summarize_study(json.loads(STORED_RESULTS.read_text(encoding="utf-8")))


def summarize_study(contents: dict[str, Any]) -> dict[str, Any] | None:
    """What [`write_report`] takes as `study`, of the first ground in a results file: the paper's claims on tuned
    against frozen tokenizers, as far as both arms were measured. `None` where neither was."""
    results = Results(contents["cells"])
    for ground in results.grounds():
        rows = [
            _row(results, ground, claim.measure, claim.paper)
            for claim in PAPER_CLAIMS
            if (claim.arm, claim.other) == (TUNED, FROZEN)
            and MEASURES[claim.measure].unit in UNITS
            and results.difference(ground, TUNED, FROZEN, claim.measure) is not None
        ]
        if rows:
            count = max(row["seeds"] for row in rows)
            seeds = f"{count} {'seeds' if count > 1 else 'seed'}"
            return {"note": f"{seeds} on {ground} ground; differences are paired by seed.", "rows": rows}
    return None


def _row(results: Results, ground: str, measure: str, paper: str) -> dict[str, Any]:
    frozen, tuned = (results.statistic(ground, arm, measure) for arm in (FROZEN, TUNED))
    difference, shown = results.difference(ground, TUNED, FROZEN, measure), MEASURES[measure]
    half = difference.half
    return {
        "name": shown.title.partition(",")[0],
        "unit": UNITS[shown.unit],
        "frozen": frozen.mean,
        "tuned": tuned.mean,
        "difference": {
            "mean": difference.mean,
            "low": None if half is None else difference.mean - half,
            "high": None if half is None else difference.mean + half,
        },
        "seeds": difference.count,
        "paper": paper,
    }


__all__ = ["stored_summary", "summarize_study"]
