import math

import pytest
import torch
from PIL import Image

from ett.evaluation_ett import evaluate_reconstruction, reconstruct
from ett.evaluation_ett import reconstruction as reconstruction_module
from ett.evaluation_ett.networks import RandomSqueezeFeatures
from ett.scenes_ett import Scenes

CODES = torch.tensor([[[0, 0], [1, 3]]])


@pytest.fixture
def replaced(monkeypatch):
    """Lets a test say what comes back of pixels: every image has the codes CODES."""

    def replace(function):
        def encode_decode(tokenizer, pixels):
            return CODES.expand(len(pixels), -1, -1), function(pixels)

        monkeypatch.setattr(reconstruction_module, "encode_decode", encode_decode)

    return replace


def test_psnr_is_the_mean_over_images_of_values_from_0_to_1(tokenizer, replaced):
    # The first image is off by 0.1 everywhere (20 dB), the second by 0.01 (40 dB).
    replaced(lambda pixels: torch.stack([pixels[0] + 0.2, pixels[1] + 0.02]))
    scores = evaluate_reconstruction(tokenizer, [torch.zeros(3, 64, 64)] * 2, progress=False)
    assert scores["psnr"] == pytest.approx(30, abs=1e-3)


def test_a_perfect_reconstruction_scores_as_such(tokenizer, replaced):
    replaced(lambda pixels: pixels)
    scores = evaluate_reconstruction(tokenizer, Scenes(0, "test", 6), batch_size=4, progress=False)
    assert (scores["images"], scores["psnr"], scores["background_shift"]) == (6, pytest.approx(100), 0)
    assert scores["ssim"] == pytest.approx(1)
    assert scores["shapes_read"] == scores["shapes_read_original"] >= 0.95


def test_shapes_that_vanish_are_not_read(tokenizer, replaced):
    replaced(torch.ones_like)
    scores = evaluate_reconstruction(tokenizer, Scenes(0, "test", 12), progress=False)
    assert (scores["shapes_read"], scores["texts_read"]) == (0, 0)
    assert scores["shapes_read_original"] >= 0.95


def test_usage_and_perplexity_count_the_codes_of_all_images(tokenizer, replaced):
    replaced(lambda pixels: pixels)
    scores = evaluate_reconstruction(tokenizer, Scenes(0, "test", 3), batch_size=2, progress=False)
    assert scores["codebook_usage"] == 3 / 16
    assert scores["perplexity"] == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))


def test_background_shift_is_in_levels_of_255_and_ignores_what_stands_inside(tokenizer, replaced):
    def tint(pixels):
        changed = pixels.clone()
        changed[:, 0] += 2 * 30 / 255
        changed[:, :, 20:40, 20:40] = 1
        return changed

    replaced(tint)
    scores = evaluate_reconstruction(tokenizer, [torch.zeros(3, 64, 64)], progress=False)
    assert scores["background_shift"] == pytest.approx(10, abs=1e-3)


def test_any_images_can_be_measured_and_only_scenes_are_read(tokenizer):
    images = [Image.new("L", (32, 64), 200), torch.zeros(3, 64, 32)]
    scores = evaluate_reconstruction(tokenizer, iter(images), progress=False)
    assert set(scores) == {"images", "psnr", "ssim", "codebook_usage", "perplexity", "background_shift"}
    assert scores["images"] == 2 and math.isfinite(scores["psnr"])


def test_the_numbers_do_not_depend_on_the_batch_size(tokenizer):
    scenes = Scenes(0, "test", 5)
    one = evaluate_reconstruction(tokenizer, scenes, batch_size=1, progress=False)
    assert evaluate_reconstruction(tokenizer, scenes, batch_size=5, progress=False) == pytest.approx(one, rel=1e-4)


def test_reconstruct_gives_one_image_of_the_same_size_for_each(tokenizer):
    images = reconstruct(tokenizer, Scenes(0, "test", 3), batch_size=2)
    assert [image.size for image in images] == [(72, 72)] * 3


def test_measuring_leaves_the_tokenizer_in_its_mode(tokenizer):
    tokenizer.train()
    try:
        evaluate_reconstruction(tokenizer, Scenes(0, "test", 1), progress=False)
        assert tokenizer.training
    finally:
        tokenizer.eval()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image"),
        ([Image.new("RGB", (64, 64)), Image.new("RGB", (32, 64))], "different sizes"),
        ([torch.zeros(1, 64, 64)], r"expected \(3, H, W\)"),
    ],
)
def test_images_that_cannot_be_measured_are_refused(tokenizer, images, message):
    with pytest.raises(ValueError, match=message):
        evaluate_reconstruction(tokenizer, images, progress=False)


def test_judges_measure_the_distance_of_features(tokenizer, replaced):
    judges = torch.nn.ModuleDict({"rfid": RandomSqueezeFeatures()})
    distances = []
    for noise in (0.0, 0.02, 0.2):
        replaced(lambda pixels, noise=noise: (pixels + noise * torch.randn_like(pixels)).clamp(-1, 1))
        scores = evaluate_reconstruction(tokenizer, Scenes(0, "test", 8), progress=False, judges=judges)
        distances.append(scores["rfid"])
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances[0] < distances[1] < distances[2]


def test_random_features_are_the_same_in_every_run_and_leave_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = RandomSqueezeFeatures()
    assert torch.equal(torch.rand(1), expected)
    images = torch.rand(2, 3, 72, 72)
    features = first(images)
    assert features.shape == (2, RandomSqueezeFeatures.num_features)
    assert torch.equal(features, RandomSqueezeFeatures()(images)) and not torch.equal(features[0], features[1])
