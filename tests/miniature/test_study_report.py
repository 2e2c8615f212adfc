"""The study's report: intervals, verdicts and pages from cells with known numbers."""

import copy
import json

import pytest
from PIL import Image

from ett.miniature_ett import study, study_matrix, study_report
from ett.miniature_ett.charts import MINUS
from ett.miniature_ett.study_claims import CONTROLS, PAPER_CLAIMS, PAPER_TABLE_4, PAPER_TABLE_5, Claim, judge
from ett.miniature_ett.study_results import (
    MEASURES,
    UNKNOWN,
    Results,
    Statistic,
    format_difference,
    format_statistic,
    summarize,
)
from ett.miniature_ett.study_summary import summarize_study

GENERAL, PSNR = "questions.general", "tokenizer.psnr"
BANNER = "A quick run: every task ran with a few steps, and the figures mean nothing."
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
LACKING = "intervals need at least two"


def cell(ground, seed, arm, **measures):
    return {
        "ground": ground,
        "seed": seed,
        "arm": arm,
        "status": "done",
        "seconds": {"semantic": 300.0, "chat": 60.0, "measuring": 90.0},
        "peak_memory_gb": 1.25,
        "measures": measures,
    }


def contents(seeds=3, quick=False):
    """A results file of a study in which tuning gains 5 points and costs 1 dB, with some noise by seed."""
    cells = {}
    for ground in ("textured", "flat"):
        for seed in range(seeds):
            for arm in study_matrix.ARMS:
                measures = {name: 0.5 + 0.01 * seed for name in MEASURES if name not in ("", PSNR)}
                gain = 0.05 + 0.001 * (seed % 2) if arm.startswith("alpha") else 0.0
                measures[GENERAL] += gain
                measures["questions.reading"] -= gain
                measures["captions.semantic.word"] = None
                measures[PSNR] = 24.0 - (1 if gain else 0) + 0.1 * seed
                if study_matrix.ARMS[arm].measures != "tokenizer" and not study_matrix.ARMS[arm].tuned:
                    measures = {name: value for name, value in measures.items() if not name.startswith("tokenizer")}
                cells[f"{ground}-{seed}-{arm}"] = cell(ground, seed, arm, **measures)
    settings = {
        "version": "0.1.0",
        "quick": quick,
        "measuring": dict(study_matrix.MEASURING),
        "stages": {"semantic-embedding-frozen": {"recipe": {"training": {"max_steps": 1500}}}},
    }
    return {"settings": settings, "versions": [{"torch": "2.15.0"}], "cells": cells}


# Numbers


def test_an_interval_is_students():
    # The quantile of Student's t for two degrees of freedom is 4.303; the deviation of 1, 2, 3 is 1.
    statistic = summarize([1.0, 2.0, 3.0])
    assert (statistic.mean, statistic.half) == (2.0, pytest.approx(4.303 / 3**0.5, abs=1e-3))


def test_one_value_has_no_interval_and_none_no_mean():
    assert summarize([2.0]) == Statistic(2.0, None, 1)
    assert summarize([]) is None


def test_differences_are_paired_by_seed():
    values = {"a": (1.0, 5.0, 9.0), "b": (0.0, 4.0, 8.0, 99.0)}
    cells = {
        f"{arm}{seed}": cell("flat", seed, arm, x=value) for arm in "ab" for seed, value in enumerate(values[arm])
    }
    difference = Results(cells).difference("flat", "a", "b", "x")
    assert difference == Statistic(1.0, 0.0, 3)


@pytest.mark.parametrize(
    ("difference", "sign", "verdict"),
    [
        (Statistic(2.0, 1.0, 3), 1, "holds"),
        (Statistic(-2.0, 1.0, 3), -1, "holds"),
        (Statistic(-2.0, 1.0, 3), 1, "does not hold"),
        (Statistic(2.0, 2.5, 3), 1, "open"),
        (Statistic(0.0, 0.0, 3), 1, "open"),
        (Statistic(2.0, None, 1), 1, "one seed"),
        (None, 1, "not measured"),
    ],
)
def test_a_direction_holds_where_the_interval_is_on_its_side_of_zero(difference, sign, verdict):
    assert judge(Claim("", GENERAL, "a", "b", sign), difference) == verdict


def test_frozen_arms_have_the_reconstruction_of_the_tokenizer_before_tuning_and_tuned_ones_never():
    results = Results(contents()["cells"])
    assert results.values("flat", "embedding-frozen", PSNR) == results.values("flat", "tokenizer", PSNR)
    without = {name: cell for name, cell in contents()["cells"].items() if cell["arm"] != "alpha-0"}
    assert Results(without).values("flat", "alpha-0", PSNR) == {}


def test_an_arm_s_generation_is_that_of_its_own_cell():
    results = Results({"x": cell("flat", 0, "index-frozen-generation", **{"generation.mean": 0.4})})
    assert results.values("flat", "index-frozen", "generation.mean") == {0: 0.4}


def test_the_summary_for_the_demo_compares_frozen_and_tuned_in_the_papers_claims():
    summary = summarize_study(contents())
    assert summary["note"] == "3 seeds on textured ground; differences are paired by seed."
    rows = {row["name"]: row for row in summary["rows"]}
    assert next(iter(rows)) == "general questions" and rows["PSNR"]["unit"] == "dB"
    general = rows["general questions"]
    assert (general["frozen"], general["tuned"]) == (pytest.approx(0.51), pytest.approx(0.51 + 0.05 + 0.001 / 3))
    assert general["difference"]["low"] < general["difference"]["mean"] < general["difference"]["high"]
    assert general["paper"] == "SEED 54.8 to 60.0"
    assert summarize_study({"cells": {}}) is None
    assert summarize_study(contents(seeds=1))["rows"][0]["difference"]["low"] is None


def test_cells_that_diverged_are_in_no_mean():
    cells = contents()["cells"]
    cells["flat-1-alpha-0"] = {"ground": "flat", "seed": 1, "arm": "alpha-0", "status": "diverged"}
    assert Results(cells).seeds("flat", "alpha-0") == [0, 2]


def test_numbers_are_shown_with_their_intervals_and_units():
    assert format_statistic(Statistic(0.5149, 0.0212, 5), GENERAL) == "51.5 ± 2.1"
    assert format_statistic(Statistic(23.456, None, 1), PSNR) == "23.46"
    assert format_statistic(None, PSNR) == UNKNOWN
    assert format_difference(Statistic(0.069, 0.021, 5), GENERAL) == "+6.9 ± 2.1 points"
    assert format_difference(Statistic(-1.0, 0.5, 5), PSNR) == f"{MINUS}1.00 ± 0.50 dB"


# What is compared


def test_every_claim_compares_arms_and_measures_that_there_are():
    for claim in (*PAPER_CLAIMS, *CONTROLS):
        assert claim.measure in MEASURES and claim.sign in (1, -1)
        assert {claim.arm, claim.other} <= study_matrix.ARMS.keys()
    assert PAPER_TABLE_4.keys() | PAPER_TABLE_5.keys() <= study_matrix.ARMS.keys()


def test_claims_say_what_the_papers_figures_say():
    """Signs and quoted figures follow from Tables 4 and 5."""
    columns = {"SEED": 0, "GQA": 1, "TQA": 2, "MME": 3, "GenEval": 4, "rFID": 4}
    quoted = [claim for claim in PAPER_CLAIMS if claim.paper.split()[0] in columns]
    assert len(quoted) == 13
    for claim in quoted:
        name, before, _, after = claim.paper.split()
        table = PAPER_TABLE_4 if name == "GenEval" else PAPER_TABLE_5
        table = table if claim.arm in table and claim.other in table else PAPER_TABLE_4
        pair = (table[claim.other][columns[name]], table[claim.arm][columns[name]])
        assert pair == (before, after), claim
        assert (float(after) - float(before)) * claim.sign > 0, claim


# Pages


def write(tmp_path, results):
    return study_report.write_study(results, tmp_path).read_text(encoding="utf-8")


def test_the_page_shows_ours_beside_the_papers_and_says_what_holds(tmp_path):
    page = write(tmp_path, contents())
    assert f"| tuned, {ALPHA} = 0.25 | 56.0 ± 2.5 |" in page and "| 60.0 | 54.8 | 46.9 | 1124.7 | 0.43 |" in page
    rows = [line for line in page.splitlines() if line.startswith("| Tuning beats frozen embeddings |")]
    assert "| general questions | SEED 54.8 to 60.0 | **holds**: +5.0 ± 0.1 points | **holds**" in rows[0]
    assert f"| reading | TQA 40.9 to 46.9 | **does not hold**: {MINUS}5.0 ± 0.1 points |" in rows[3]
    assert "| generation | GenEval 0.34 to 0.43 | **open**: +0.0 ± 0.0 points |" in rows[4]
    assert f"| Tuning costs some reconstruction | PSNR | no figure | **holds**: {MINUS}1.00 ± 0.00 dB |" in page
    assert "On textured ground, of 19 directions of the paper" in page
    assert f"1,500 and {UNKNOWN} steps" in page and "torch 2.15.0" in page
    assert "No cell diverged or failed." in page
    assert BANNER not in page and LACKING not in page


def test_the_page_comes_from_the_results_file_alone(tmp_path):
    page = write(tmp_path / "one", contents())
    stored = json.loads((tmp_path / "one" / "study" / "results.json").read_text())
    assert write(tmp_path / "two", stored) == page
    for name in ("trade-off.png", "attributes.png", "table.md", "results.json"):
        pair = [(tmp_path / side / "study" / name).read_bytes() for side in ("one", "two")]
        assert pair[0] == pair[1], name
    assert Image.open(tmp_path / "one" / "study" / "trade-off.png").width > 800


def test_the_short_table_has_ten_lines(tmp_path):
    write(tmp_path, contents())
    lines = (tmp_path / "study" / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    assert lines[5].startswith(f"| tuned, {ALPHA} = 0.25 | 56.0 ± 2.5 |")
    assert lines[-1].startswith("Means over 3 seeds on textured ground, with 95% intervals;")


def test_one_seed_is_shown_without_intervals_which_is_said_once(tmp_path):
    page = write(tmp_path, contents(seeds=1))
    assert page.count(LACKING) == 1
    assert "±" not in page and "**one seed**: +5.0 points" in page


def test_a_quick_run_is_marked(tmp_path):
    assert write(tmp_path, contents(quick=True)).count(BANNER) == 1


def test_cells_without_figures_are_listed_with_their_reasons(tmp_path):
    results = contents()
    reason = {"stage": "semantic-alpha-0", "reason": "Step 7: caption_loss is nan in micro-batch 1."}
    for seed, status in enumerate(("diverged", "failed", "skipped")):
        results["cells"][f"flat-{seed}-alpha-0"] = {
            **{"ground": "flat", "seed": seed, "arm": "alpha-0"},
            "status": status,
            **reason,
        }
    page = write(tmp_path, results)
    assert "- flat-0-alpha-0 diverged in `semantic-alpha-0`: Step 7: caption_loss is nan in micro-batch 1." in page
    assert "- flat-1-alpha-0 failed in" in page
    assert "- flat-2-alpha-0 was skipped, since `semantic-alpha-0` diverged: Step 7" in page


def test_a_study_of_a_few_arms_is_reported_too(tmp_path):
    results = contents()
    results["cells"] = {name: cell for name, cell in results["cells"].items() if cell["arm"] == "vq-only"}
    assert "not measured" in write(tmp_path, results)
    results["cells"] = {}
    assert "No cell diverged" in write(tmp_path, results)


def test_sheets_are_copied_once_and_stay(tmp_path):
    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (8, 8)).save(sheet)
    docs = tmp_path / "docs"
    study_report.write_study(contents(), docs, {"flat": sheet})
    page = study_report.write_study(contents(), docs).read_text(encoding="utf-8")
    assert "study/sheet-flat.png" in page and "study/sheet-textured.png" not in page
    assert (docs / "study" / "sheet-flat.png").read_bytes() == sheet.read_bytes()


# From a study's folder


@pytest.fixture
def folder(tmp_path):
    """A study's folder with one cell; see `study.report_study`."""
    output_dir = tmp_path / "ett-study"
    settings = study.describe_settings({"tokenizer"}, quick=False)
    (output_dir / "cells").mkdir(parents=True)
    study._write(output_dir / "study.json", settings)
    made = cell("flat", 0, "tokenizer", **{PSNR: 25.0}) | {
        "fingerprint": study.fingerprint("tokenizer", settings),
        "versions": {"torch": "2.15.0"},
    }
    study._write(output_dir / "cells" / "flat-0-tokenizer.json", made)
    return output_dir


def results_of(docs):
    return json.loads((docs / "study" / "results.json").read_text())


def test_cells_are_gathered_over_those_of_a_results_file_of_the_same_settings(folder, tmp_path):
    docs = tmp_path / "docs"
    study.report_study(folder, docs)
    stored = results_of(docs)
    assert stored["versions"] == [{"torch": "2.15.0"}]
    assert stored["cells"]["flat-0-tokenizer"]["measures"] == {PSNR: 25.0}
    assert "fingerprint" not in stored["cells"]["flat-0-tokenizer"]
    stored["cells"]["flat-1-tokenizer"] = stored["cells"]["flat-0-tokenizer"] | {"seed": 1}
    stored["cells"]["flat-0-tokenizer"] = copy.deepcopy(stored["cells"]["flat-0-tokenizer"]) | {"measures": {PSNR: 9}}
    (docs / "study" / "results.json").write_text(json.dumps(stored))
    study.report_study(folder, docs)
    assert {name: cell["measures"][PSNR] for name, cell in results_of(docs)["cells"].items()} == {
        "flat-0-tokenizer": 25.0,
        "flat-1-tokenizer": 25.0,
    }


def test_a_results_file_of_other_settings_gives_way(folder, tmp_path):
    docs = tmp_path / "docs"
    other = contents()
    other["settings"]["measuring"]["scenes"] = 99
    study_report.write_study(other, docs)
    study.report_study(folder, docs)
    assert results_of(docs)["cells"].keys() == {"flat-0-tokenizer"}


def test_without_a_folder_the_results_file_is_reported(tmp_path):
    docs = tmp_path / "docs"
    with pytest.raises(ValueError, match=r"neither a study in '.*' nor '.*results.json'; run `ett study` first"):
        study.report_study(tmp_path / "absent", docs)
    study_report.write_study(contents(), docs)
    page = (docs / "study.md").read_text()
    (docs / "study.md").unlink()
    assert study.report_study(tmp_path / "absent", docs).read_text() == page


def test_a_cell_of_other_settings_is_an_error(folder, tmp_path):
    path = folder / "cells" / "flat-0-tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match=r"flat-0-tokenizer\.json' is a cell of other settings or of another version"):
        study.report_study(folder, tmp_path / "docs")


def test_a_quick_run_does_not_get_into_the_docs(folder, tmp_path):
    path = folder / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quick": True}))
    with pytest.raises(ValueError, match="holds a quick run, whose figures mean nothing"):
        study.report_study(folder, tmp_path / "docs")
