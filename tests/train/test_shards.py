"""Shards: fixed ranges of rows, written once, by one machine or several, and whole or not there."""

import json

import datasets
import pytest
from PIL import Image

from ett.data_ett.shards import Part, Skipped, require_shards, write_shards

FEATURES = datasets.Features({"number": datasets.Value("int64"), "text": datasets.Value("string")})


def make_rows(numbers):
    for number in numbers:
        yield {"number": number, "text": f"row {number}"}


def write(folder, num_rows=10, make_rows=make_rows, settings=None, rows_per_shard=4, part=None):
    settings = settings or {"of": "numbers"}
    return write_shards(folder, num_rows, make_rows, FEATURES, "made.json", settings, rows_per_shard, part, False)


def read(folder):
    return datasets.load_dataset(str(folder), split="train")


def names(folder):
    return sorted(path.name for path in (folder / "data").iterdir())


def test_shards_are_a_data_set_in_the_order_of_its_source(tmp_path):
    report = write(tmp_path / "out")
    assert report.rows == report.read == 10 and report.missing == [] and report.seconds > 0
    assert names(tmp_path / "out") == [f"train-0000{number}-of-00003.parquet" for number in range(3)]
    rows = read(tmp_path / "out")
    assert rows.features == FEATURES
    assert rows["number"][:] == list(range(10))


def test_rows_that_cannot_be_made_are_left_out_and_named_in_the_manifest(tmp_path):
    def some(numbers):
        for row in make_rows(numbers):
            yield Skipped(f"image {row['number']}", "It is torn.") if row["number"] in (1, 5, 6) else row

    report = write(tmp_path / "out", make_rows=some)
    assert read(tmp_path / "out")["number"][:] == [0, 2, 3, 4, 7, 8, 9]
    assert report.rows == 7
    assert report.skipped[0] == {"row": 1, "name": "image 1", "reason": "It is torn."}
    assert "7 rows, 3 skipped.\n  image 1: It is torn." in report.summary()
    manifest = json.loads((tmp_path / "out" / "manifest" / "train-00001-of-00003.json").read_text())
    assert manifest["rows"] == 2 and manifest["source_rows"] == [4, 8]
    assert [entry["row"] for entry in manifest["skipped"]] == [5, 6]


def test_a_shard_may_be_left_empty(tmp_path):
    def late(numbers):
        return (Skipped("early", "No.") if row["number"] < 4 else row for row in make_rows(numbers))

    write(tmp_path / "out", make_rows=late)
    assert read(tmp_path / "out")["number"][:] == list(range(4, 10))


def test_rows_of_which_none_can_be_used_are_an_error(tmp_path):
    def none(numbers):
        return (Skipped(f"image {number}", "It is torn.") for number in numbers)

    with pytest.raises(ValueError, match=r"None of the 10 rows can be used; the first, image 0: It is torn\."):
        write(tmp_path / "out", make_rows=none)


def test_an_interrupted_run_goes_on_and_writes_the_same_files(tmp_path):
    def interrupted(numbers):
        for row in make_rows(numbers):
            if row["number"] == 5:
                raise KeyboardInterrupt
            yield row

    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", make_rows=interrupted)
    asked = []
    report = write(tmp_path / "out", make_rows=lambda numbers: asked.append(numbers) or make_rows(numbers))
    assert asked == [range(4, 8), range(8, 10)]
    assert report.rows == 10 and report.read == 6
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "out" / "data" / name).read_bytes() == (tmp_path / "whole" / "data" / name).read_bytes()
    assert names(tmp_path / "out") == names(tmp_path / "whole")


def test_a_damaged_shard_is_found_and_written_again(tmp_path):
    write(tmp_path / "out")
    path = tmp_path / "out" / "data" / "train-00001-of-00003.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    require_shards(tmp_path / "out", "made.json")
    with pytest.raises(ValueError, match=r"incomplete: train-00001-of-00003\.parquet is damaged: its SHA-256"):
        require_shards(tmp_path / "out", "made.json", verify=True)
    assert write(tmp_path / "out").read == 4
    assert path.read_bytes() == content


def test_a_shard_of_another_size_is_found_without_reading_it(tmp_path):
    write(tmp_path / "out")
    path = tmp_path / "out" / "data" / "train-00002-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00002-of-00003\.parquet has \d+ bytes instead of"):
        require_shards(tmp_path / "out", "made.json")


def test_several_machines_write_what_one_would(tmp_path):
    write(tmp_path / "one")
    first = write(tmp_path / "two", part=Part(0, 2))
    assert first.missing == ["train-00001-of-00003"] and first.rows == 6
    assert "Left to other machines: 1 of the shards, train-00001-of-00003" in first.summary()
    with pytest.raises(ValueError, match=r"is incomplete: train-00001-of-00003\.parquet is missing"):
        require_shards(tmp_path / "two", "made.json")
    assert write(tmp_path / "two", part=Part(1, 2)).missing == []
    assert require_shards(tmp_path / "two", "made.json", verify=True)["of"] == "numbers"
    for name in names(tmp_path / "one"):
        assert (tmp_path / "two" / "data" / name).read_bytes() == (tmp_path / "one" / "data" / name).read_bytes()


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "0/0", "a/b"])
def test_a_part_that_there_is_not_is_an_error(text):
    with pytest.raises(ValueError, match=r"such as 0/4 to 3/4"):
        Part.parse(text)


def test_other_settings_in_the_same_folder_are_an_error_that_names_them(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(ValueError, match=r"other settings \(of was 'numbers' and is 'letters'\)"):
        write(tmp_path / "out", settings={"of": "letters"})
    with pytest.raises(ValueError, match=r"other settings \(rows_per_shard was 4 and is 5\)"):
        write(tmp_path / "out", rows_per_shard=5)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else \(for instance thesis\.tex\)"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_images_that_are_files_move_into_the_shards(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (3, 2), "red").save(path)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"image": {"path": str(path), "bytes": None}}]
    write_shards(tmp_path / "out", 1, lambda numbers: rows, features, "made.json", {}, progress=False)
    path.unlink()
    image = datasets.load_dataset(str(tmp_path / "out"), split="train").cast_column("image", datasets.Image())
    assert image[0]["image"].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("content", ["{", "[]", '{"title": "mine"}'])
def test_a_record_that_is_none_is_an_error(tmp_path, content):
    (tmp_path / "made.json").write_text(content)
    with pytest.raises(ValueError, match=r"made\.json' is no"):
        require_shards(tmp_path, "made.json")
