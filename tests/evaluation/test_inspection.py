"""A tokenizer inspected before stage 2: the gradient's path on images, and what is said of it."""

import datasets
import pytest
import torch
from PIL import Image

from ett.evaluation_ett import Images, SceneImages, describe_inspection, inspect_tokenizer
from ett.evaluation_ett.inspection import judge
from ett.modeling_ett.gradient_path import measure_gradient_path
from ett.processing_ett import ETTImageProcessor
from ett.scenes_ett import Scenes

SIZE = (32, 32)


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def scene_images():
    return SceneImages(ETTImageProcessor(), SIZE, 5)


def test_the_images_are_scenes_that_training_does_not_see(scene_images):
    scene = Scenes(0, "test")[3].render()
    size = {"height": 32, "width": 32}
    expected = ETTImageProcessor()(scene, size=size, resample=Image.Resampling.BILINEAR, return_tensors="pt")
    assert torch.equal(scene_images[3], expected["pixel_values"][0]) and len(scene_images) == 5


def test_the_measures_are_those_of_the_latents_and_codes_of_all_images(tokenizer, scene_images):
    result = inspect_tokenizer(tokenizer, scene_images, "tiny", batch_size=5, progress=False)
    pixels = torch.stack([scene_images[index] for index in range(5)])
    with torch.no_grad():
        latents = tokenizer.encode(pixels).latents
        codes = tokenizer.quantize(latents).codes
    path = measure_gradient_path(tokenizer.quantize, latents).summary()
    assert result["measures"]["images"] == 5
    for name, value in path.items():
        assert result["measures"][name] == pytest.approx(value.item(), rel=1e-5)
    assert result["measures"]["codebook_usage"] == codes.unique().numel() / 16


def test_probability_and_use_of_the_codes_do_not_depend_on_the_batches(tokenizer, scene_images):
    results = [inspect_tokenizer(tokenizer, scene_images, "tiny", size, progress=False) for size in (1, 5)]
    for name in ("images", "largest_probability", "codebook_usage", "perplexity"):
        assert results[0]["measures"][name] == pytest.approx(results[1]["measures"][name], rel=1e-5)


def test_images_that_cannot_be_read_are_skipped_and_named(tokenizer, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    result = inspect_tokenizer(tokenizer, Images(str(tmp_path), ETTImageProcessor(), SIZE), "tiny", progress=False)
    assert result["measures"]["images"] == 1
    assert [image["name"].rpartition("/")[2] for image in result["skipped"]] == ["b.png"]
    assert "Skipped 1 of 2" in describe_inspection(result)


def test_without_an_image_that_can_be_read_there_is_nothing_to_say(tokenizer, tmp_path):
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ValueError, match=r"None of the 1 images of '.*' can be read"):
        inspect_tokenizer(tokenizer, Images(str(tmp_path), ETTImageProcessor(), SIZE), "tiny", progress=False)


@pytest.mark.parametrize(
    ("ratio", "largest_probability", "dead_tokens", "path", "words"),
    [
        (1.2, 0.3, 0.0, "open", "captions can tune this tokenizer in stage 2 as it is"),
        (
            0.016,
            0.99,
            0.2,
            "narrow",
            "ratio is 0.016, and 20% of the tokens are dead; a lower model.logit_scale than 2",
        ),
        (200.0, 0.99, 0.96, "narrow", "and 96% of the tokens are dead; a lower model.logit_scale than 2"),
        (200.0, 1.0, 0.995, "closed", "captions cannot tune this tokenizer"),
        (1e-8, 1.0, 1.0, "closed", "captions cannot tune this tokenizer; give stage 2 a lower model.logit_scale"),
        (1e-5, 1e-4, 1.0, "closed", "a higher model.logit_scale than 2, or model.straight_through_weight=0.1"),
    ],
)
def test_the_verdict_follows_from_ratio_and_dead_tokens(ratio, largest_probability, dead_tokens, path, words):
    found = judge(ratio, largest_probability, dead_tokens, logit_scale=2.0)
    assert found["path"] == path and words in found["verdict"]


def test_the_verdict_comes_last(tokenizer, scene_images):
    result = inspect_tokenizer(tokenizer, scene_images, "tiny", progress=False)
    assert describe_inspection(result).splitlines()[-1] == result["verdict"]
