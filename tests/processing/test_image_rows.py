"""Rows of datasets: images by file name are found where the data lie, whoever reads them."""

import base64
import io
import json
import unicodedata

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ett.data_ett.image_rows import image_name, load_rows, open_images


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
    lines = [json.dumps({"photo": cell, "text": "a"}) for cell in cells]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    rows = load_rows(str(folder / "rows.jsonl"), None, "photo", ("photo",), "--image-column")
    assert rows.column_names == ["photo", "text"]
    opened = [open_images(cell) for cell in rows["photo"]]
    assert [[image.getpixel((0, 0))[0] for image in images] for images in opened] == reds
    assert image_name(rows[0]["photo"], 0) == str(folder / (cells[0] if isinstance(cells[0], str) else "0.png"))


def png(red, side=16):
    with io.BytesIO() as file:
        Image.new("RGB", (side, side), (red, 0, 0)).save(file, "PNG")
        return file.getvalue()


def reds(rows, column="image"):
    return [[image.getpixel((0, 0))[0] for image in open_images(cell)] for cell in rows[column]]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_data_urls_and_base64_stand_for_images_beside_names_of_files(folder, several):
    encoded = base64.b64encode(png(7)).decode()
    lines = base64.encodebytes(png(8)).decode()
    cells = ["1.png", encoded, lines, "data:image/png;base64," + base64.b64encode(png(9)).decode()]
    rows = [{"image": [cell] if several else cell} for cell in cells]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_rows(str(folder / "rows.jsonl"), None, "image", ("image",), "--image-column")
    assert reds(loaded) == [[1], [7], [8], [9]]
    assert [image_name(cell, number) for number, cell in enumerate(loaded["image"])][1:] == [
        "row 1",
        "row 2",
        "row 3",
    ]
    raw = [open_images(cell, folder)[0].getpixel((0, 0))[0] for cell in cells]
    assert raw == [1, 7, 8, 9]


def test_a_url_in_a_column_is_fetched(folder, monkeypatch):
    monkeypatch.setattr(
        "ett.processing_ett.image_reading_ett._fetch", lambda url: png(5) if url.endswith("/5") else b""
    )
    (folder / "rows.jsonl").write_text(json.dumps({"image": "https://example.com/5"}))
    rows = load_rows(str(folder / "rows.jsonl"), None, "image", ("image",), "--image-column")
    assert reds(rows) == [[5]] and image_name(rows[0]["image"], 0) == "https://example.com/5"


@pytest.mark.parametrize("form", ["large", "view", "struct", "list"])
def test_arrows_large_and_view_types_hold_images(folder, form):
    texts, contents = {"view": (pyarrow.string_view(), pyarrow.binary_view())}.get(
        form, (pyarrow.large_string(), pyarrow.large_binary())
    )
    value, kind = png(3), contents
    if form == "struct":
        value, kind = {"bytes": png(3), "path": None}, pyarrow.struct({"bytes": contents, "path": texts})
    if form == "list":
        value, kind = [png(3)], pyarrow.large_list(contents)
    names = ["0.png"] if form == "list" else "0.png"
    columns = {
        "image": pyarrow.array([value, None], kind),
        "name": pyarrow.array([names, None], pyarrow.large_list(texts) if form == "list" else texts),
        "text": pyarrow.array(["red", "blue"], texts),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    for column, expected in (("image", 3), ("name", 0)):
        rows = load_rows(str(folder / "rows.parquet"), None, column, (column, "text"), "--image-column")
        assert reds(rows, column) == [[expected], []] and rows["text"] == ["red", "blue"]


@pytest.mark.parametrize(("of_files", "of_names"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_in_another_unicode_form_are_found(folder, of_files, of_names):
    name = "Käfig/Größe.png"
    file = folder / unicodedata.normalize(of_files, name)
    file.parent.mkdir()
    file.write_bytes(png(6))
    given = unicodedata.normalize(of_names, name)
    assert open_images(given, folder)[0].getpixel((0, 0))[0] == 6
    (folder / "rows.jsonl").write_text(json.dumps({"image": given}))
    assert reds(load_rows(str(folder / "rows.jsonl"), None, "image", ("image",), "--image-column")) == [[6]]
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": given, "text": "a"}))
    assert reds(load_rows(str(folder), None, "image", ("image", "text"), "--image-column")) == [[6]]


def test_a_row_of_nulls_has_no_image():
    assert open_images({"bytes": None, "path": None}) == open_images(None) == open_images([]) == []
