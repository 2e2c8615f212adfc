"""Images tokenised once: what is written of them."""

import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ett.cli import app
from ett.data_ett.codes import row_to_codes
from ett.data_ett.shards import Part
from ett.processing_ett import ETTImageProcessor
from ett.train import FolderExamples

from .tokenized import NUM_IMAGES, image, rows, tokenize


@pytest.fixture
def tokenizer(make_vision_tokenizer):
    return make_vision_tokenizer().eval()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number in range(NUM_IMAGES):
        image(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"image {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def codes(images, tokenizer, tmp_path):
    tokenize(images, tmp_path / "codes", tokenizer)
    return tmp_path / "codes"


def test_codes_of_every_image_stand_beside_the_other_columns(images, tokenizer, codes):
    written = rows(codes)
    assert written.column_names == ["text", "image_codes"]
    assert written["text"][:2] == ["image 0", "image 1"]
    image_processor = ETTImageProcessor(size={"height": 16, "width": 16})
    for number, row in enumerate(written):
        pixels = image_processor(image(number), return_tensors="pt")["pixel_values"]
        assert torch.equal(row_to_codes(row, 32), tokenizer.encode_codes(pixels))
        assert [len(column) for column in row["image_codes"][0]] == [4] * 4


def test_the_record_says_what_made_the_codes(images, codes):
    record = json.loads((codes / "tokenization.json").read_text())
    assert len(record.pop("fingerprint")) == 64
    assert record.pop("preprocessing")["size"] == [16, 16]
    assert record == {
        "format": 2,
        "num_codes": 32,
        "model": "some/tokenizer",
        "data_set": str(images),
        "split": None,
        "image_column": "image",
        "num_rows": NUM_IMAGES,
        "rows_per_shard": 10_000,
    }


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"workers": 2}, {"rows_per_shard": 4}])
def test_codes_do_not_depend_on_how_the_work_is_cut(images, tokenizer, codes, tmp_path, options):
    tokenize(images, tmp_path / "other", tokenizer, **options)
    assert rows(tmp_path / "other").to_list() == rows(codes).to_list()


def test_two_machines_write_what_one_would(images, tokenizer, codes, tmp_path):
    for index in (1, 0):
        report = tokenize(images, tmp_path / "both", tokenizer, rows_per_shard=2, part=Part(index, 2))
    assert report.rows == report.images == 4 and report.missing == []
    assert rows(tmp_path / "both").to_list() == rows(codes).to_list()


def test_an_image_that_cannot_be_read_is_left_out_and_named(images, tokenizer, tmp_path):
    (images / "2.png").write_bytes(b"no image at all")
    report = tokenize(images, tmp_path / "codes", tokenizer)
    assert report.rows == report.images == NUM_IMAGES - 1
    assert [(entry["row"], entry["name"].rsplit("/")[-1]) for entry in report.skipped] == [(2, "2.png")]
    assert len(rows(tmp_path / "codes")) == NUM_IMAGES - 1


def test_a_row_may_have_several_images_or_none(tokenizer, tmp_path):
    features = datasets.Features({"image": datasets.List(datasets.Image()), "text": datasets.Value("string")})
    several = {"image": [[image(0), image(1)], [], [image(2)]], "text": ["two", "none", "one"]}
    datasets.Dataset.from_dict(several, features=features).to_parquet(str(tmp_path / "several.parquet"))
    (tmp_path / "several").mkdir()
    (tmp_path / "several.parquet").rename(tmp_path / "several" / "train.parquet")
    assert tokenize(tmp_path / "several", tmp_path / "codes", tokenizer).images == 3
    assert [row_to_codes(row, 32).shape[0] for row in rows(tmp_path / "codes")] == [2, 0, 1]


def test_images_may_be_named_by_their_files(images, tokenizer, codes, tmp_path):
    (tmp_path / "lists").mkdir()
    lines = [json.dumps({"image": f"{number}.png", "text": f"image {number}"}) for number in range(NUM_IMAGES)]
    (tmp_path / "lists" / "train.jsonl").write_text("\n".join(lines))
    tokenize(tmp_path / "lists" / "train.jsonl", tmp_path / "far", tokenizer, image_folder=str(images))
    assert rows(tmp_path / "far").to_list() == rows(codes).to_list()
    (images / "metadata.jsonl").unlink()
    (tmp_path / "lists" / "train.jsonl").rename(images / "train.jsonl")
    tokenize(images / "train.jsonl", tmp_path / "near", tokenizer)
    assert rows(tmp_path / "near").to_list() == rows(codes).to_list()


def test_images_in_tars_become_codes_that_are_learned_from_with_their_texts(images, tokenizer, codes, tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for number in range(2):
            tar.add(images / f"{number}.png", f"{number}.png")
            (tmp_path / "text").write_text(f"image {number}")
            tar.add(tmp_path / "text", f"{number}.txt")
    tokenize(tmp_path / "tars", tmp_path / "from_tars", tokenizer, image_column="png")
    from_tars, expected = (FolderExamples(str(path), "caption") for path in (tmp_path / "from_tars", codes))
    for number in range(2):
        assert from_tars[number]["text"] == f"image {number}"
        assert torch.equal(from_tars[number]["image_codes"], expected[number]["image_codes"])


def test_a_size_that_does_not_divide_into_codes_is_an_error(images, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"image size is 18 x 18 .* multiples of 4"):
        tokenize(images, tmp_path / "codes", tokenizer, size=18)
    assert not (tmp_path / "codes").exists()


def test_another_tokenizers_codes_are_not_put_beside_these(images, codes, make_vision_tokenizer):
    with pytest.raises(ValueError, match="begun with other settings \\(fingerprint was"):
        tokenize(images, codes, make_vision_tokenizer(seed=1).eval())


def test_a_column_that_is_in_the_way_is_an_error(codes, tokenizer, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "image_codes": datasets.Value("string")})
    (tmp_path / "taken").mkdir()
    taken = datasets.Dataset.from_dict({"image": [image(0)], "image_codes": ["mine"]}, features=features)
    taken.to_parquet(str(tmp_path / "taken" / "train.parquet"))
    with pytest.raises(ValueError, match="has a column 'image_codes' already; rename it"):
        tokenize(tmp_path / "taken", tmp_path / "out", tokenizer)


def test_the_command_writes_one_machines_shards_and_says_how_fast(images, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ETTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "tokenizer")
    arguments = ["tokenize", images, tmp_path / "codes", "--model", tmp_path / "tokenizer", "--image-size", 8]
    arguments += ["--rows-per-shard", 4, "--batch-size", 3, "--shard", "1/2"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    assert "2 rows, 0 skipped.\n2 images, " in result.stdout and "images a second" in result.stdout
    assert "Left to other machines: 1 of the shards" in result.stdout
    assert [np.shape(codes) for codes in rows(tmp_path / "codes")["image_codes"]] == [(1, 2, 2)] * 2


def test_a_shard_that_there_is_not_is_refused_before_a_model_is_loaded(tmp_path):
    result = CliRunner().invoke(app, ["tokenize", "images", str(tmp_path), "--model", "absent", "--shard", "2/2"])
    assert result.exit_code == 1 and "The shard is '2/2'" in result.stderr
