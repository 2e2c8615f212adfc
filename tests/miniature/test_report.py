"""The report: one page that needs nothing but itself, and the same numbers as JSON."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from ett.miniature_ett import report, write_report
from ett.miniature_ett.charts import format_number, interval_chart, line_chart
from ett.scenes_ett import PROMPT_CATEGORIES, QUESTION_TYPES

VOID = {"meta", "img", "image", "path", "rect", "line", "circle", "polyline", "br", "link"}


class Page(HTMLParser):
    """Text, resources and images of a page; fails on tags that do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.hero, self.resources, self.ids, self.links = [], "", "", [], set(), []
        self.tags, self.handlers, self.levels, self.descriptions = set(), [], [], []
        self.feed(html)
        assert self.open == []
        self.text, self.hero = " ".join(self.text.split()), " ".join(self.hero.split())

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids.add(attrs.get("id"))
        self.handlers += [name for name in attrs if name.startswith("on")]
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "img":
            self.descriptions.append(attrs.get("alt"))
        for name in ("src", "href", "srcset", "data", "poster"):
            if name in attrs:
                (self.links if tag == "a" else self.resources).append(attrs[name])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "header" in self.open:
            self.hero += data


def page_of(results, folder, study=None):
    return Page(write_report(results, folder, study).read_text(encoding="utf-8"))


def test_the_page_shows_the_key_figures(results, tmp_path):
    text = page_of(results, tmp_path).text
    for figure in ("61.2%", "19.9%", "0.375", "0.250", "24.50 dB", "23.90 dB", "62%", "34.0%", "70%", "10 min 5 s"):
        assert figure in text, figure
    for words in (
        "what color is the ring?",
        "an orange ring",
        "No orange ring was found.",
        "102 of 300 images are right",
        "1,234,567",
        "torch",
        "2.15.0",
        "alpha",
        "seed 7",
    ):
        assert words in text, words


def test_the_page_needs_nothing_but_itself(results, study, tmp_path):
    page = page_of(results, tmp_path, study)
    assert page.resources and all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    # Names of namespaces are no addresses.
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_links_lead_to_sections_and_to_the_numbers(results, study, tmp_path):
    for page in (page_of(results, tmp_path), page_of(results, tmp_path, study)):
        sections = {link.removeprefix("#") for link in page.links if link.startswith("#")}
        assert sections and sections <= page.ids
        assert "results.json" in page.links and (tmp_path / "results.json").is_file()


def test_every_image_is_on_the_page_and_described(results, tmp_path):
    # In sections: 3 reconstructions, 1 question, 2 captions, 2 + 1 generated. In the hero: 1 generated, 1 caption.
    # In the diagram: 2, described as a whole.
    page = page_of(results, tmp_path)
    assert len(page.resources) == 13
    assert len(page.descriptions) == 11 and all(page.descriptions)
    assert "generated from: an orange ring" in page.descriptions


def test_headings_skip_no_level(results, study, tmp_path):
    levels = page_of(results, tmp_path, study).levels
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_hero_shows_right_images_and_a_true_caption(results, tmp_path):
    text = page_of(results, tmp_path).hero
    assert "a red cross" in text and "an orange ring" not in text and "first of each category" in text
    assert "top a large blue cross." in text and "top a small red ring." not in text


def test_the_hero_admits_that_nothing_is_right(results, tmp_path):
    results["generation"]["examples"] = results["generation"]["examples"][:1]
    for score in results["generation"]["categories"].values():
        score["correct"] = 0
    results["captions"]["examples"] = results["captions"]["examples"][:1]
    text = page_of(results, tmp_path).hero
    assert "an orange ring" in text and "The detector judged none of the 300 images right." in text
    assert "None of the 1 captions is wholly true." in text


def test_without_a_right_example_the_hero_does_not_call_its_images_right(results, tmp_path):
    results["generation"]["examples"] = results["generation"]["examples"][:1]
    text = page_of(results, tmp_path).hero
    assert "None of the images kept as examples is right. 102 of 300 images are right." in text


def test_the_gallery_has_the_first_images_of_each_category_unselected(results):
    examples = [
        {"category": category, "correct": turn == 2, "prompt": turn}
        for turn in range(3)
        for category in reversed(PROMPT_CATEGORIES)
    ]
    gallery = report._first_of_each(examples, 2)
    assert [example["category"] for example in gallery] == [*PROMPT_CATEGORIES] * 2
    assert [example["prompt"] for example in gallery] == [0] * 6 + [1] * 6


def test_the_json_holds_the_same_numbers_without_images(results, study, tmp_path):
    write_report(results, tmp_path, study)
    figures = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert figures["understanding"]["mean"] == 0.612
    assert figures["generation"]["examples"][0] == {
        name: value for name, value in results["generation"]["examples"][0].items() if name != "image"
    }
    assert set(figures) == {*results, "study"} and figures["study"] == study


def test_numbers_that_are_not_finite_become_null(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text)["stages"][0]["history"][1]["caption_loss"] is None
    assert "NaN" not in text


def test_unseen_pairs_have_a_column_and_a_section_of_their_own(results, tmp_path):
    scores = report._question_scores(results["understanding"], results["unseen"]["understanding"])
    assert scores[0] == report.Score("colour", 0.612, 0.125, 100, 0.375)
    assert scores[-1] == report.Score("mean of types", 0.612, scores[-1].chance, 600, 0.375)
    text = page_of(results, tmp_path).text
    assert "37.5%" in text and "5.5%" in text and "0.750" in text and "a green circle" in text


def test_a_type_that_was_not_asked_of_unseen_pairs_has_no_score_there(results, tmp_path):
    del results["unseen"]["understanding"]["types"]["reading"]
    scores = report._question_scores(results["understanding"], results["unseen"]["understanding"])
    assert scores[QUESTION_TYPES.index("reading")].unseen is None
    page_of(results, tmp_path)


def test_scores_at_chance_are_marked(results, tmp_path):
    # Two captions are too few for kinds of shape and sizes; the one word is wrong.
    captions = report._caption_scores(results["captions"], results["unseen"]["captions"])
    assert [row.name for row in captions if row.at_chance] == ["kinds of shape", "sizes", "word or number"]
    mark = "at chance: not learned"
    assert page_of(results, tmp_path).text.count(mark) == 3
    results["understanding"]["types"]["relation"]["accuracy"] = 0.55
    results["generation"]["categories"]["single object"]["accuracy"] = 0.3
    text = page_of(results, tmp_path).text
    assert text.count(mark) == 5
    assert f"relation {mark}" in text and f"single object {mark}" in text


def test_attributes_of_captions_are_counted_in_the_true_captions(results):
    results["captions"]["attributes"]["place"] = 0.5
    rows = report._caption_scores(results["captions"], results["unseen"]["captions"])
    assert [(row.name, row.count) for row in rows] == [
        ("number of shapes", 2),
        ("places", 2),
        ("colours", 1),
        ("kinds of shape", 1),
        ("sizes", 1),
        ("word or number", 1),
        ("wholly true", 2),
    ]
    assert rows[-2].at_chance and not rows[1].at_chance


def test_an_attribute_without_anything_to_count_has_no_score(results, tmp_path):
    results["captions"]["attributes"]["word"] = None
    row = report._caption_scores(results["captions"], results["unseen"]["captions"])[-2]
    assert row.accuracy is None and not row.at_chance
    page_of(results, tmp_path)


def test_a_stage_that_has_not_learned_says_so(results, tmp_path):
    assert "has not learned" not in page_of(results, tmp_path).text
    results["stages"][0]["history"][-1]["caption_loss"] = 1.9
    text = page_of(results, tmp_path).text
    assert "Stage 2 has not learned." in text and text.count("has not learned") == 2
    assert "2 → 1.9" in text


def test_without_a_study_the_page_has_no_section_on_it(results, tmp_path):
    page = page_of(results, tmp_path)
    assert "study" not in page.ids and "study" not in page.text.lower() and "Does tuning help?" not in page.text


def test_the_study_shows_means_intervals_and_differences(results, study, tmp_path):
    page = page_of(results, tmp_path, study)
    assert "study" in page.ids
    for words in (
        "Does tuning help?",
        "not of this run",
        "Textured scenes <b>and</b> five seeds.",
        "48.0% 47.0 to 49.0",
        "55.3% 54.3 to 56.3",
        "+7.3 points +6.3 to +8.3",
        "54.8 to 60.0",
        "\N{MINUS SIGN}0.170 nats \N{MINUS SIGN}0.190 to \N{MINUS SIGN}0.150",
        "22.50 dB 22.25 to 22.75",
        "one seed, no interval",
    ):
        assert words in page.text, words


def test_a_difference_counts_only_where_its_interval_excludes_0(study):
    shown = report._study(study)
    assert [row["verdict"] for row in shown["rows"]] == ["better", "better", "worse", "open", "open"]
    assert shown["counts"] == {"better": 2, "worse": 1, "open": 2}
    assert list(shown["charts"]) == ["%", "nats", "dB"]


def test_only_a_quick_run_carries_the_banner(results, tmp_path):
    banner = "A quick run: every stage ran, few steps, the figures mean nothing."
    assert banner not in page_of(results, tmp_path).text
    assert banner in page_of({**results, "quick": True}, tmp_path).text


@pytest.mark.parametrize("place", ["answer", "caption", "prompt", "study"])
def test_generated_text_cannot_break_the_page(results, study, tmp_path, place):
    text = '</p>"><script>alert(1)</script>'
    match place:
        case "answer":
            results["understanding"]["examples"][0]["answer"] = text
        case "caption":
            results["captions"]["examples"][1]["caption"] = text
        case "prompt":
            results["generation"]["examples"][1]["prompt"] = text
        case "study":
            study["rows"][0]["name"] = text
    assert text in page_of(results, tmp_path, study).text
    assert "<script" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_page_has_no_scripts(results, study, tmp_path):
    page = page_of(results, tmp_path, study)
    assert "script" not in page.tags and not page.handlers


def test_each_loss_has_a_curve_and_settings_of_the_optimizer_have_none(results):
    stage = report._training(results["stages"][0])
    assert [curve["name"] for curve in stage["curves"]] == ["caption loss", "loss"]
    assert stage["curves"][0]["last"] == 1.0


def test_equal_curves_are_shown_once(results):
    history = [{"step": step, "loss": loss, "caption_loss": loss} for step, loss in ((1, 2.0), (2, 1.0))]
    stage = report._training({**results["stages"][0], "history": history})
    assert [curve["name"] for curve in stage["curves"]] == ["caption loss"]


def test_a_stage_without_a_history_has_no_curves_and_has_not_learned(results, tmp_path):
    results["stages"][0]["history"] = []
    assert "has not learned" in page_of(results, tmp_path).text


def test_memory_is_left_out_where_it_is_unknown(results, tmp_path):
    assert "2.2 GB" in page_of(results, tmp_path).text
    assert "GB" not in page_of({**results, "peak_memory_gb": None}, tmp_path).text


def test_a_failed_write_leaves_the_old_report_whole(results, tmp_path):
    write_report(results, tmp_path)
    before = (tmp_path / "index.html").read_bytes(), (tmp_path / "results.json").read_bytes()
    results["settings"] = {"model": object()}
    with pytest.raises(TypeError):
        write_report(results, tmp_path)
    assert ((tmp_path / "index.html").read_bytes(), (tmp_path / "results.json").read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "results.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (0.0625, "0.0625"),
        (-1.5, "\N{MINUS SIGN}1.5"),
        (99.96, "100"),
        (2e-5, "2e\N{MINUS SIGN}5"),
        (3e7, "3e7"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [5.0], [-3.0, 2e6], [math.inf, 1.0, 2.0]])
def test_a_chart_is_an_image_with_a_label_in_the_pages_colours(values):
    svg = ElementTree.fromstring(line_chart(list(enumerate(values)), "a <loss>"))
    assert svg.attrib["role"] == "img" and svg.attrib["aria-label"] == "a <loss>"
    drawn = ElementTree.tostring(svg, encoding="unicode")
    assert "var(--accent)" in drawn and "var(--line)" in drawn and "nan" not in drawn and "inf" not in drawn


def test_a_chart_without_finite_values_is_empty():
    assert line_chart([(1, math.nan)], "loss") == ""


def estimate(mean, half=None):
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high}


@pytest.mark.parametrize("unit", ["%", "nats"])
def test_an_interval_chart_shows_every_measure_in_its_colour(unit):
    rows = [
        {"name": "a <loss>", "frozen": estimate(0.25, 0.05), "tuned": estimate(0.95, 0.04)},
        {"name": "other", "frozen": estimate(0.5), "tuned": estimate(0.5)},
    ]
    svg = interval_chart(rows, ("frozen", "tuned"), unit)
    assert svg.count("var(--frozen)") == svg.count("var(--accent)") > 2
    assert "a &lt;loss&gt;" in svg and "<loss>" not in svg
    assert ("100%" in svg) == (unit == "%")


def test_an_interval_chart_without_finite_values_is_empty():
    rows = [{"name": "loss", "frozen": estimate(math.nan), "tuned": estimate(math.nan)}]
    assert interval_chart(rows, ("frozen", "tuned"), "nats") == ""
