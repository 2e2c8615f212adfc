import json
import math
import re
from html.parser import HTMLParser

import pytest

from miniature_ett import report, write_report
from miniature_ett.charts import format_number, line_chart
from miniature_ett.targets import compare_with_targets

VOID = {"meta", "img", "image", "path", "rect", "line", "circle", "polyline", "br", "link"}


class Page(HTMLParser):
    """Text, resources and pictures of a page; fails on tags that do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.resources, self.ids, self.links = [], "", [], set(), []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
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


def page_of(results, folder):
    return Page(write_report(results, folder).read_text(encoding="utf-8"))


def test_the_page_shows_the_key_figures(results, tmp_path):
    text = page_of(results, tmp_path).text
    for figure in ("61.2%", "+11.2 points", "0.250", "0.375", "24.50 dB", "23.90 dB", "62.5%", "34.0%", "10 min 5 s"):
        assert figure in text, figure
    for words in (
        "what color is the ring?",
        "a red ring",
        "as asked",
        "1,234,567",
        "torch",
        "2.15.0",
        "alpha",
        "seed 7",
    ):
        assert words in text, words


def test_the_page_needs_nothing_but_itself(results, tmp_path):
    page = page_of(results, tmp_path)
    assert page.resources and all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not re.search(r"https?://|@import|url\((?!#)", (tmp_path / "index.html").read_text(encoding="utf-8"))


def test_links_lead_to_sections_and_to_the_figures(results, tmp_path):
    page = page_of(results, tmp_path)
    sections = {link.removeprefix("#") for link in page.links if link.startswith("#")}
    assert sections and sections <= page.ids
    assert "results.json" in page.links and (tmp_path / "results.json").is_file()


def test_every_picture_is_on_the_page(results, tmp_path):
    # In sections: 3 reconstructions, 1 question, 1 caption, 1 drawing; above them: 1 drawing and 2 in the diagram.
    assert len(page_of(results, tmp_path).resources) == 9


def test_the_json_holds_the_same_figures_without_pictures(results, tmp_path):
    write_report(results, tmp_path)
    figures = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert figures["understanding"]["tuned"]["mean"] == 0.612
    assert figures["drawings"]["examples"][0] == {
        name: value for name, value in results["drawings"]["examples"][0].items() if name != "image"
    }
    assert set(figures) == {*results, "targets"}


def test_numbers_that_are_not_finite_become_null(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text)["stages"][0]["history"][1]["caption_loss"] is None
    assert "NaN" not in text


def test_unseen_pairs_have_columns_of_their_own(results, tmp_path):
    assert report._scores(results["understanding"], results["unseen"]["understanding"])[-1] | {"chance": 0} == {
        "name": "mean of types",
        "chance": 0,
        "frozen": 0.5,
        "tuned": 0.612,
        "unseen_frozen": 0.125,
        "unseen_tuned": 0.375,
        "count": 24,
    }
    text = page_of(results, tmp_path).text
    assert "12.5%" in text and "37.5%" in text and "5.5%" in text


def test_only_a_quick_run_carries_the_banner(results, tmp_path):
    banner = "A quick run: every stage ran, few steps, the figures mean nothing."
    assert banner not in page_of(results, tmp_path).text
    assert banner in page_of({**results, "quick": True}, tmp_path).text


def test_generated_text_cannot_break_the_page(results, tmp_path):
    results["understanding"]["tuned"]["examples"][0]["answer"] = "</p><script>alert(1)</script>"
    assert "</p><script>alert(1)</script>" in page_of(results, tmp_path).text
    assert "<script" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_each_loss_has_a_curve_and_settings_of_the_optimizer_have_none(results):
    curves = report._curves(results["stages"][0])
    assert [curve["name"] for curve in curves] == ["caption loss"]
    assert curves[0]["last"] == 1.0


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


def test_targets_say_what_was_met(results):
    met = {target.name: target.met for target in compare_with_targets(results)}
    assert not met["Colour questions"] and met["Shape questions"]
    assert met["Mean accuracy over the frozen tokenizer"] and met["Caption loss over the frozen tokenizer"]
    assert met["PSNR before end-to-end tuning"] and met["PSNR lost in tuning"]
    assert met["Drawings with the colours asked for"]


def test_a_target_that_was_not_measured_is_not_met(results):
    del results["understanding"]["tuned"]["types"]["reading"]
    reading = next(target for target in compare_with_targets(results) if target.name == "Reading questions")
    assert (reading.reached, reading.met) == (None, False)


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
def test_a_chart_stays_inside_its_frame(values):
    svg = line_chart(list(enumerate(values)), "a <loss>")
    numbers = re.findall(r"([\d.-]+),([\d.-]+)", " ".join(re.findall(r'points="([^"]*)"', svg)))
    assert numbers and all(0 <= float(x) <= 280 and 0 <= float(y) <= 130 for x, y in numbers)
    assert 'aria-label="a &lt;loss&gt;"' in svg


def test_a_chart_without_finite_values_is_empty():
    assert line_chart([(1, math.nan)], "loss") == ""
