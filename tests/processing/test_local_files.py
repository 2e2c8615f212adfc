"""Which files a local dataset has: names never decide it, folders named exactly as splits do."""

import json
import os

import datasets
import pytest
from PIL import Image

from ett.data_ett.image_rows import load_rows, read_rows
from ett.data_ett.local_files import clean_text, find_captions, list_files, match_files

NAMES = [f"{number:04}.jpg" for number in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name, format="JPEG")
    return folder


def names_in(path, split=None, streaming=False):
    rows = read_rows(str(path), split, streaming).cast_column("image", datasets.Image(decode=False))
    return [os.path.relpath(row["image"]["path"], os.path.realpath(path)) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "test-dog.jpg",
        "train station.jpg",
        "test.jpg",
        "val_1.jpg",
        "dev.eval.jpg",
        "train set/a.jpg",
        "test/a.jpg",
        "a/b/validation/1.jpg",
    ],
)
def test_names_that_contain_a_split_leave_all_seven_images(tmp_path, name, streaming):
    folder = write_images(tmp_path / "images", [*NAMES, name])
    assert sorted(names_in(folder, None, streaming)) == sorted([*NAMES, name])
    assert sorted(names_in(folder, "train", streaming)) == sorted([*NAMES, name])


def test_images_named_as_splits_alone_are_one_split(tmp_path):
    assert names_in(write_images(tmp_path / "images", ["test.jpg", "train.jpg"])) == ["test.jpg", "train.jpg"]


def test_captions_come_from_the_metadata_whatever_the_names(tmp_path):
    names = [*NAMES, "test-dog.jpg"]
    folder = write_images(tmp_path / "images", names)
    lines = [json.dumps({"file_name": name, "text": f"caption of {name}"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = load_rows(str(folder), None, "image", ("image", "text"), "--image-column")
    assert sorted(rows["text"]) == sorted(f"caption of {name}" for name in names)


def test_a_folder_of_nothing_but_folders_named_as_splits_has_splits(tmp_path):
    folder = write_images(tmp_path / "images", ["train/a.jpg", "train/b.jpg", "val/c.jpg", "Test/d.jpg"])
    (folder / "README.md").write_text("My images.")
    with pytest.raises(ValueError, match="has the splits 'train', 'validation', 'test'; name the one"):
        read_rows(str(folder), None)
    assert [len(names_in(folder, split)) for split in ("train", "validation", "test")] == [2, 1, 1]
    write_images(folder, ["other/e.jpg"])
    assert len(names_in(folder, "train")) == 5


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables_are_read_whatever_their_names(tmp_path, suffix):
    write = {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[suffix]
    for number, name in enumerate(["a", "test-dog", "train set/b"]):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        getattr(datasets.Dataset.from_dict({"text": [str(number) + "x"]}), write)(tmp_path / f"data/{name}.{suffix}")
    assert read_rows(str(tmp_path / "data"), None)["text"] == ["0x", "1x", "2x"]
    assert read_rows(str(tmp_path / f"data/test-dog.{suffix}"), "train")["text"] == ["1x"]
    assert read_rows(str(tmp_path / f"data/*.{suffix}"), None)["text"] == ["0x", "1x"]


def test_tables_that_are_all_named_exactly_as_splits_are_splits(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert read_rows(str(tmp_path), "test")["text"] == ["test"]
    (tmp_path / "train.jsonl").unlink()
    assert read_rows(str(tmp_path), "train")["text"] == read_rows(str(tmp_path), "test")["text"] == ["test"]


def test_shards_of_the_hub_are_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "test", "unseen"):
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet")
    (tmp_path / "manifest.json").write_text("{}")
    assert [read_rows(str(tmp_path), name)["text"] for name in ("train", "test", "unseen")] == [
        ["train"],
        ["test"],
        ["unseen"],
    ]


def test_brackets_in_names_are_no_patterns(tmp_path):
    folder = write_images(tmp_path / "photos [2024]", ["a [1].jpg", "b/c*.jpg"])
    assert names_in(folder) == ["a [1].jpg", "b/c*.jpg"]
    (folder / "rows [2].jsonl").write_text('{"text": "one"}')
    for path in ("rows [2].jsonl", "*.jsonl"):
        assert read_rows(str(folder / path), None)["text"] == ["one"]


def test_brackets_of_a_pattern_still_match(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("")
    assert [path[-7:] for path in match_files(f"{tmp_path}/[01]*.jsonl")] == ["0.jsonl", "1.jsonl"]


def test_brackets_of_a_folder_that_datasets_would_read_itself_are_an_error(tmp_path):
    folder = tmp_path / "saved [1]"
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(folder)
    with pytest.raises(ValueError, match=r"'.*saved \[1\]': .* brackets .* rename it"):
        read_rows(str(folder), None)


def test_linked_folders_are_read_and_circles_end(tmp_path):
    write_images(tmp_path / "elsewhere", ["a.jpg"])
    folder = write_images(tmp_path / "images", ["b.jpg"])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    assert names_in(folder) == ["b.jpg", "linked/a.jpg"]


def test_what_macos_leaves_behind_is_no_file_of_the_dataset(tmp_path):
    folder = write_images(tmp_path / "images", ["a.jpg"])
    for name in ("._a.jpg", ".DS_Store", "__MACOSX/._a.jpg", "__MACOSX/a.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nothing")
    assert [os.path.basename(path) for path in list_files(folder)] == ["a.jpg"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_beside_each_image_is_its_caption(tmp_path, streaming):
    folder = write_images(tmp_path / "images", ["0001.jpg", "0002.jpg", "test/0003.jpg"])
    (folder / "0001.txt").write_bytes("\ufeffein rotes Dach\r\n".encode())
    (folder / "test/0003.txt").write_text("three")
    rows = list(read_rows(str(folder), "train", streaming).select_columns("text"))
    assert [row["text"] for row in rows] == ["ein rotes Dach", None, "three"]


def test_fields_of_json_beside_each_image_are_columns(tmp_path):
    folder = write_images(tmp_path / "images", ["0001.jpg", "0002.jpg"])
    (folder / "0001.json").write_text(json.dumps({"caption": "one", "score": 1, "tags": ["a"], "size": {"w": 1}}))
    (folder / "0002.json").write_text(json.dumps({"caption": "two", "score": 2.5, "size": "large"}))
    (folder / "0002.txt").write_text("better")
    rows = read_rows(str(folder), None)
    assert rows["text"] == ["one", "better"] and rows["caption"] == ["one", "two"]
    assert rows["score"] == [1, 2.5] and rows["tags"] == [["a"], None] and rows["size"] == ['{"w": 1}', "large"]


@pytest.mark.parametrize("name", ["state", "config", "dataset_dict"])
def test_a_caption_file_may_have_any_name(tmp_path, name):
    folder = write_images(tmp_path / "images", [f"{name}.jpg"])
    (folder / f"{name}.json").write_text('{"text": "a map"}')
    assert read_rows(str(folder), None)["text"] == ["a map"]


def test_takeouts_json_is_no_image(tmp_path):
    folder = write_images(tmp_path / "images", ["1.jpg", "2.jpg"])
    (folder / "1.jpg.json").write_text(json.dumps({"title": "1.jpg", "description": "a dog"}))
    (folder / "2.jpg.supplemental-metadata.json").write_text(json.dumps({"title": "2.jpg", "description": ""}))
    (folder / "metadata.json").write_text(json.dumps({"title": "album"}))
    rows = read_rows(str(folder), None)
    assert names_in(folder) == ["1.jpg", "2.jpg"] and rows["text"] == ["a dog", None]


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, '"x"', '{"a": 1}'])
def test_a_caption_file_that_is_no_object_gives_nothing(tmp_path, content):
    folder = write_images(tmp_path / "images", ["1.jpg", "2.jpg"])
    (folder / "1.json").write_text(content)
    (folder / "2.txt").write_text("two")
    assert read_rows(str(folder), None)["text"] == [None, "two"]


def test_halves_of_characters_do_not_end_the_reading(tmp_path):
    folder = write_images(tmp_path / "images", ["1.jpg"])
    (folder / "1.json").write_text('{"text": "a \\ud800 dog", "tags": ["\\udc00"], "__key__": "1"}')
    rows = read_rows(str(folder), None)
    assert rows["text"] == ["a ? dog"] and rows["tags"] == [["?"]] and "__key__" not in rows.column_names


def test_a_file_belongs_to_the_image_whose_name_it_begins_with():
    images = ["a/1.jpg", "a/1.png", "a/2.jpg", "b/2.jpg"]
    files = ["a/1.txt", "a/1.png.json", "a/1.notes.json", "a/2.jpg.x.json", "b/1.txt"]
    assert find_captions(images, files) == {
        "a/1.png": ["a/1.png.json", "a/1.txt"],
        "a/2.jpg": ["a/2.jpg.x.json"],
        "a/1.jpg": ["a/1.txt"],
    }


def test_texts_lose_marks_and_ends_of_lines():
    assert clean_text(b"\xef\xbb\xbfone\r\ntwo\rthree\r\n") == "one\ntwo\nthree"
