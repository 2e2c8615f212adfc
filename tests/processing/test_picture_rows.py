"""Rows of data sets: pictures by file name are found where the data lie, whoever reads them."""

import json

import datasets
import pytest
from PIL import Image

from processing_ett.picture_rows import load_rows, open_pictures, picture_name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "data" / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("cells", "reds"), [(["1.png", None, "0.png"], [[1], [], [0]]), ([["0.png", "1.png"], []], [[0, 1], []])]
)
def test_names_of_files_are_relative_to_the_file_that_has_them(folder, cells, reds):
    lines = [json.dumps({"picture": cell, "text": "a"}) for cell in cells]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    rows = load_rows(str(folder / "rows.jsonl"), None, "picture", ("picture",), "--image-column")
    assert rows.column_names == ["picture", "text"]
    opened = [open_pictures(cell) for cell in rows["picture"]]
    assert [[picture.getpixel((0, 0))[0] for picture in pictures] for pictures in opened] == reds
    assert picture_name(rows[0]["picture"], 0) == str(folder / (cells[0] if isinstance(cells[0], str) else "0.png"))
