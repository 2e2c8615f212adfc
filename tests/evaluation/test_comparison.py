"""The figure that puts two tokenizers' reconstructions side by side."""

import numpy as np
import pytest
import torch
from PIL import Image

from ett.evaluation_ett import Images, comparison, draw_comparison, evaluate_data_set
from ett.evaluation_ett.comparison import most_different_window
from ett.evaluation_ett.networks import Judges
from ett.processing_ett import ETTImageProcessor


@pytest.fixture
def images(tmp_path):
    """Three images, of which the first cannot be read."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    for name in ("b.png", "c.png"):
        Image.linear_gradient("L").resize((40, 60)).save(folder / name)
    return Images(str(folder), ETTImageProcessor(), (32, 32))


def test_the_window_is_where_the_two_differ_most():
    first, second = torch.zeros(2, 3, 64, 32)
    second[:, 20:36, 8:16] = 0.5
    second[:, 0, 0] = 1
    assert most_different_window(first, second) == (20, 8, 16, 8)


def test_the_figure_has_a_row_for_each_readable_image(tokenizer, images, tmp_path):
    heights = []
    for count in (1, 4):
        scores = draw_comparison({"before": tokenizer, "after": tokenizer}, images, tmp_path / "out.png", count, False)
        assert len(scores) == min(count, 2)
        heights.append(Image.open(tmp_path / "out.png").height)
    assert heights[1] > 1.7 * heights[0]


def test_the_psnr_is_that_of_the_measurement(tokenizer, images, tmp_path):
    scores = draw_comparison({"before": tokenizer, "after": tokenizer}, images, tmp_path / "out.png", 4, False)
    result = evaluate_data_set(tokenizer, images, tmp_path / "out.json", "tiny", judges=Judges(), progress=False)
    assert np.mean([score["after"] for score in scores]) == pytest.approx(result["metrics"]["psnr"], abs=1e-4)


def test_both_tokenizers_are_drawn(tokenizer, images, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparison, "_draw", lambda rows, *arguments: drawn.append((rows, *arguments)))
    other = type(tokenizer)(**tokenizer.config).eval()
    draw_comparison({"before": tokenizer, "after": other}, images, tmp_path / "out.png", progress=False)
    rows, scores, names, output = drawn[0]
    assert names == ("Original", "before", "after") and output == tmp_path / "out.png"
    assert list(scores[0]) == ["before", "after"] and scores[0]["before"] != scores[0]["after"]
    original, before, after = rows[0]
    assert torch.equal(original, images[1]) and not torch.equal(before, after)
