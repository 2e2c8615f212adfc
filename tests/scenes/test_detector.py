"""The detector reads what was drawn, through blur and noise, and reads nothing where nothing is."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ett.scenes_ett import NUMBERS, WORDS, Background, Scene, Scenes, Shape, Text, detect


def blurred(scene, radius, noise, seed):
    pixels = np.asarray(scene.render().filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255
    return pixels + np.random.default_rng(seed).normal(0, noise / 255, pixels.shape)


def share_of_shapes_read(scenes, radius, noise):
    right = total = 0
    for index, scene in enumerate(scenes):
        detected = detect(blurred(scene, radius, noise, index))
        seen = {shape.place: (shape.color, shape.shape) for shape in detected.shapes}
        right += sum(seen.get(shape.place) == (shape.color, shape.shape) for shape in scene.shapes)
        total += len(scene.shapes)
    return right / total


@pytest.mark.parametrize("ground", ["plain", "flat", "textured", "mixed"])
def test_at_least_99_of_100_rendered_scenes_are_read_without_an_error(ground):
    scenes = list(Scenes(11, "unseen", 400, ground)) + list(Scenes(11, "train", 100, ground))
    right = sum((seen.shapes, seen.text) == (s.shapes, s.text) for s in scenes for seen in [detect(s.render())])
    assert right >= 0.99 * len(scenes)


def test_shapes_are_read_through_blur_and_noise():
    scenes = list(Scenes(12, "test", length=100))
    assert share_of_shapes_read(scenes, radius=1.0, noise=5) >= 0.99
    assert share_of_shapes_read(scenes, radius=2.0, noise=8) >= 0.90


def test_faded_colors_keep_their_names():
    right = total = 0
    for scene in Scenes(13, "test", length=60):
        pixels = scene.pixels().astype(np.float32)
        middle = np.median(pixels, axis=(0, 1))
        seen = {shape.place: shape.color for shape in detect((middle + 0.8 * (pixels - middle)) / 255).shapes}
        right += sum(seen.get(shape.place) == shape.color for shape in scene.shapes)
        total += len(scene.shapes)
    assert right >= 0.98 * total


@pytest.mark.parametrize("row", ["top", "middle", "bottom"])
def test_every_word_and_number_is_read_through_blur(row):
    for content in WORDS + NUMBERS:
        scene = Scene((), Text(content, row))
        seen = detect(blurred(scene, 1.0, 5, seed=0))
        assert (seen.shapes, seen.text) == ((), scene.text)


@pytest.mark.parametrize(
    "background",
    [
        Background("plain", (226, 228, 232)),
        Background("gradient", (250, 230, 214), (216, 241, 243)),
        Background("stripes", (233, 226, 248), vertical=False, period=4),
        Background("texture", (226, 228, 232), strength="soft", seed=3),
        Background("texture", (250, 243, 224), strength="strong", seed=4),
    ],
)
def test_an_empty_background_holds_nothing(background):
    seen = detect(Scene((), background=background).render())
    assert seen.shapes == () and seen.text is None


def test_the_background_color_is_reported():
    scene = Scene((Shape("red", "circle", "large", "center"),), background=Background("plain", (220, 233, 250)))
    assert detect(scene.render()).background_rgb == (220, 233, 250)


def test_noise_holds_nothing():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        faint = 0.9 + rng.normal(0, 0.05, (72, 72, 3))
        for image in (rng.random((72, 72, 3)), faint):
            seen = detect(image)
            assert seen.shapes == () and seen.text is None


def test_a_smear_across_cells_is_no_shape():
    image = Image.new("RGB", (72, 72), (250, 250, 250))
    ImageDraw.Draw(image).line((0, 22, 71, 27), fill=(220, 30, 40), width=4)
    assert detect(image).shapes == ()


def test_images_and_arrays_are_read_alike():
    scene = Scenes(14, "test")[0]
    image = scene.render()
    pixels = np.asarray(image)
    assert detect(image) == detect(pixels) == detect(pixels / 255) == detect(image.convert("RGBA"))


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected an image of shape \(72, 72, 3\), got \(32, 32, 3\)"):
        detect(Image.new("RGB", (32, 32)))


def test_values_that_are_no_numbers_do_not_break_the_detector():
    assert detect(np.full((72, 72, 3), np.nan)).shapes == ()
