"""A tokenizer measured on a folder of images, good and bad ones: the result, resuming, and what is refused."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ett.evaluation_ett import Images, choose_size, data_sets, describe, evaluate_data_set, evaluate_reconstruction
from ett.evaluation_ett.networks import Judges
from ett.processing_ett import ETTImageProcessor


class Features(nn.Module):
    """Stands in for Inception."""

    num_features = 3

    def forward(self, images):
        return images.mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def photographs(tmp_path):
    """Thirteen images of some sizes."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(13):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((60 + index, 50), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def strange(tmp_path):
    """Six strange images that can be read, then three files that cannot."""
    folder = tmp_path / "strange"
    folder.mkdir()
    image = Image.linear_gradient("L").resize((70, 60))
    Image.fromarray(np.linspace(0, 65535, 70 * 60).astype(np.uint16).reshape(60, 70)).save(folder / "a_16_bits.png")
    image.convert("CMYK").save(folder / "b_cmyk.jpg")
    image.convert("P").save(folder / "c_palette.png")
    image.convert("RGBA").save(folder / "d_rgba.png")
    Image.new("RGB", (1, 1), "red").save(folder / "e_one_pixel.png")
    image.convert("RGB").save(folder / "f_rgb.jpg")
    (folder / "g_text.png").write_text("no image")
    whole = (folder / "f_rgb.jpg").read_bytes()
    (folder / "h_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 20_000)).save(folder / "i_bomb.png")
    return folder


@pytest.fixture
def images_of():
    """Makes the images of a folder, 32 x 32 unless told otherwise."""

    def make(folder, **options):
        return Images(str(folder), ETTImageProcessor(), **{"size": (32, 32), **options})

    return make


@pytest.fixture
def measure(tokenizer, tmp_path):
    """Measures images in batches of 3 and returns what the file says."""
    output = tmp_path / "result.json"

    def run(images, tokenizer=tokenizer, **options):
        judges = Judges(nn.ModuleDict({"rfid": Features()}), {"lpips_alex": "Put x.", "lpips_vgg": "Put y."})
        options = {"batch_size": 3, "judges": judges, "progress": False, **options}
        result = evaluate_data_set(tokenizer, images, output, "tiny", **options)
        assert json.loads(output.read_text()) == result
        return result

    return run


@pytest.fixture
def interrupt(measure, monkeypatch):
    """Starts a run that ends without a warning at its third batch, after the state of six images was written."""

    def run(images, **options):
        calls = []

        def encode_decode(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*arguments)

        original = data_sets.encode_decode
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(data_sets, "encode_decode", encode_decode)
            measure(images, save_every=3, **options)

    return run


def state_of(tmp_path):
    return tmp_path / "result.state.safetensors"


def test_the_file_holds_every_metric_and_every_setting(measure, photographs, images_of, tokenizer):
    result = measure(images_of(photographs))
    assert set(result["metrics"]) == set(data_sets.METRICS)
    assert result["metrics"]["images"] == 13 and result["skipped"] == []
    settings = result["settings"]
    assert settings["model"] == "tiny" and len(settings["weights_sha256"]) == 64
    assert settings["data_set"] == str(photographs) and settings["split"] == "train" and settings["rows"] == 13
    assert settings["image_size"] == [32, 32] and settings["dtype"] == "float32"
    assert settings["codebook_size"] == tokenizer.config.num_vq_embeddings
    assert set(settings["versions"]) == set(data_sets.LIBRARIES)


def test_images_are_resized_bilinearly_to_cover_the_size_and_cropped_around_the_centre(photographs, images_of):
    image = Image.open(photographs / "00.png").convert("RGB")
    expected = image.resize((32, 32), Image.Resampling.BILINEAR, box=(5, 0, 55, 50))
    pixels = images_of(photographs)[0]
    assert torch.equal(pixels, torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 127.5 - 1)


def test_codes_are_counted_as_in_the_report(measure, photographs, images_of, tokenizer):
    images = images_of(photographs)
    report = evaluate_reconstruction(tokenizer, list(images), progress=False)
    metrics = measure(images)["metrics"]
    assert {name: metrics[name] for name in ("codebook_usage", "perplexity")} == pytest.approx(
        {name: report[name] for name in ("codebook_usage", "perplexity")}
    )
    assert metrics["psnr"] == pytest.approx(report["psnr"], abs=0.1) and metrics["psnr"] != report["psnr"]


def test_what_is_missing_is_null_and_said(measure, photographs, images_of, caplog):
    result = measure(images_of(photographs))
    assert result["metrics"]["lpips_vgg"] is None and result["missing"]["lpips_vgg"] == "Put y."
    assert "LPIPS (VGG) will not be measured. Put y." in caplog.text
    table = describe(result)
    assert "LPIPS (VGG)     not measured\n" in table and "No LPIPS (VGG): Put y." in table


def test_strange_images_are_measured_and_unreadable_ones_are_skipped_by_name(measure, strange, images_of):
    result = measure(images_of(strange))
    assert result["metrics"]["images"] == 6
    assert [(item["row"], item["name"].rsplit("/")[-1]) for item in result["skipped"]] == [
        (6, "g_text.png"),
        (7, "h_truncated.jpg"),
        (8, "i_bomb.png"),
    ]
    assert "too large" in result["skipped"][2]["reason"]
    assert "Skipped 3 of 9 images:\n" in describe(result)


def test_a_skipped_image_is_not_replaced_by_another(measure, photographs, images_of):
    without = measure(images_of(photographs))["metrics"]
    (photographs / "13.png").write_text("no image")
    assert measure(images_of(photographs))["metrics"] == without


def test_a_folder_without_any_readable_image_is_an_error(measure, tmp_path, images_of):
    folder = tmp_path / "unreadable"
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"None of the 1 images of .* can be read; the first, .*a\.png"):
        measure(images_of(folder))
    assert not (tmp_path / "result.json").exists()


def test_images_may_come_from_a_table_in_its_order(tmp_path, images_of, photographs):
    paths = [str(photographs / f"{index:02}.png") for index in (3, 1, 2)]
    rows = datasets.Dataset.from_dict({"photo": paths}).cast_column("photo", datasets.Image())
    rows.to_parquet(tmp_path / "table.parquet")
    (tmp_path / "tables").mkdir()
    (tmp_path / "table.parquet").rename(tmp_path / "tables" / "table.parquet")
    images = images_of(tmp_path / "tables", image_column="photo", limit=2)
    folder = images_of(photographs)
    assert len(images) == 2
    assert torch.equal(images[0], folder[3]) and torch.equal(images[1], folder[1])


def test_workers_read_the_same(measure, photographs, images_of):
    images = images_of(photographs)
    assert measure(images, workers=2) == measure(images)


# Resuming


def test_an_interrupted_run_ends_with_exactly_the_same_file(measure, interrupt, photographs, images_of, tmp_path):
    (photographs / "03a.png").write_text("no image")
    images = images_of(photographs)
    whole = measure(images)
    (tmp_path / "result.json").unlink()
    interrupt(images)
    assert state_of(tmp_path).exists() and not (tmp_path / "result.json").exists()
    assert measure(images) == whole
    assert not state_of(tmp_path).exists()


def test_a_run_interrupted_before_its_result_is_written_has_measured_everything(
    measure, photographs, images_of, monkeypatch
):
    images, measured = images_of(photographs), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_sets, "write_json", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        measure(images)
    monkeypatch.setattr(data_sets, "encode_decode", lambda *arguments: measured.append(arguments))
    assert measure(images)["metrics"]["images"] == 13
    assert not measured


def test_a_resumed_run_does_not_measure_again(measure, interrupt, photographs, images_of, monkeypatch):
    images = images_of(photographs)
    interrupt(images)
    measured = []
    original = data_sets.encode_decode
    monkeypatch.setattr(data_sets, "encode_decode", lambda *args: measured.append(len(args[1])) or original(*args))
    assert measure(images)["metrics"]["images"] == 13
    assert measured == [3, 3, 1]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"size": (64, 64)}, r"image_size was \[32, 32\] and is \[64, 64\]"),
        ({"limit": 12}, "rows was 13 and is 12"),
    ],
)
def test_a_state_of_other_images_is_refused(measure, interrupt, photographs, images_of, options, difference):
    interrupt(images_of(photographs))
    with pytest.raises(ValueError, match=f"{difference}.*--no-resume"):
        measure(images_of(photographs, **options))


def test_a_state_of_other_weights_is_refused(measure, interrupt, photographs, images_of, tokenizer, tmp_path):
    interrupt(images_of(photographs))
    other = type(tokenizer)(**tokenizer.config)
    with pytest.raises(ValueError, match=r"other settings: weights_sha256 was .* and is"):
        measure(images_of(photographs), tokenizer=other)
    assert state_of(tmp_path).exists()


def test_a_state_of_a_changed_folder_is_refused(measure, interrupt, photographs, images_of):
    interrupt(images_of(photographs))
    Image.new("RGB", (40, 40)).save(photographs / "05.png")
    with pytest.raises(ValueError, match="data_fingerprint was"):
        measure(images_of(photographs))


def test_without_resuming_a_state_is_thrown_away(measure, interrupt, photographs, images_of, tmp_path):
    interrupt(images_of(photographs))
    result = measure(images_of(photographs, size=(64, 64)), resume=False)
    assert result["metrics"]["images"] == 13 and not state_of(tmp_path).exists()


def test_a_damaged_state_is_an_error_that_says_what_to_do(measure, photographs, images_of, tmp_path):
    state_of(tmp_path).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"result\.state\.safetensors, is damaged .*--no-resume"):
        measure(images_of(photographs))


# What is refused before anything is measured


def test_the_size_is_the_image_processors_unless_given(tokenizer):
    processor = ETTImageProcessor(size={"height": 64, "width": 96})
    assert choose_size(tokenizer, processor, None) == (64, 96)
    assert choose_size(tokenizer, processor, 128) == (128, 128)


@pytest.mark.parametrize("size", [24, 76])
def test_a_size_that_does_not_fit_is_refused(tokenizer, size):
    with pytest.raises(ValueError, match=f"{size} x {size} .*multiples of 8 and at least 32.*--image-size"):
        choose_size(tokenizer, ETTImageProcessor(), size)


def test_a_column_without_images_is_refused(tmp_path, images_of):
    (tmp_path / "rows.jsonl").write_text('{"label": 1}\n')
    with pytest.raises(ValueError, match=r"column 'label' .* holds Value.*expected images.*--image-column"):
        images_of(tmp_path, image_column="label")


def test_one_of_several_splits_has_to_be_named(tmp_path, images_of):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / split / "a.png")
    with pytest.raises(ValueError, match="has the splits 'train', 'test'; name the one"):
        images_of(tmp_path / "data")
    assert len(images_of(tmp_path / "data", split="test")) == 1
