"""What the scenes are: deterministic, split by pairs, varied, and drawn where they say."""

import numpy as np
import pytest

from ett.scenes_ett import (
    COLORS,
    GROUNDS,
    NUMBERS,
    PLACES,
    ROWS,
    SHAPES,
    UNSEEN_PAIRS,
    WORDS,
    Background,
    Scene,
    Scenes,
    Shape,
    Text,
    drawing_pair,
)
from ett.scenes_ett.rendering import CELL_CENTERS, CELL_SIZE, IMAGE_SIZE, background_pixels, shape_mask, text_mask


def pairs(scene):
    return {(shape.color, shape.shape) for shape in scene.shapes}


@pytest.fixture(scope="module")
def train():
    return [Scenes(0, "train")[index] for index in range(1000)]


@pytest.fixture(scope="module")
def unseen():
    return [Scenes(0, "unseen")[index] for index in range(1000)]


def test_a_scene_depends_on_seed_split_and_index_alone():
    forwards, backwards = Scenes(3, "train"), Scenes(3, "train")
    there = [forwards[index] for index in range(20)]
    back = [backwards[index] for index in reversed(range(20))][::-1]
    assert there == back
    assert all(np.array_equal(a.pixels(), b.pixels()) for a, b in zip(there, back, strict=True))


def test_seeds_splits_indices_and_drawings_have_streams_of_their_own():
    scenes = [Scenes(seed, "test")[index] for seed in range(5) for index in range(20)]
    scenes += [Scenes(seed, "train")[index] for seed in range(5) for index in range(20)]
    scenes += [drawing_pair(seed, "train", index)[1] for seed in range(5) for index in range(20)]
    assert len({repr(scene) for scene in scenes}) == len(scenes)


@pytest.mark.parametrize("split", ["train", "test"])
def test_training_and_testing_never_show_an_unseen_pair(split):
    assert not any(pairs(Scenes(0, split)[index]) & UNSEEN_PAIRS for index in range(1000))


def test_the_unseen_split_always_shows_an_unseen_pair(unseen):
    assert all(pairs(scene) & UNSEEN_PAIRS for scene in unseen)
    assert set.union(*map(pairs, unseen)) & UNSEEN_PAIRS == UNSEEN_PAIRS


def test_each_shape_has_one_unseen_color_and_no_color_twice():
    assert sorted(shape for _, shape in UNSEEN_PAIRS) == sorted(SHAPES)
    assert len({color for color, _ in UNSEEN_PAIRS}) == len(SHAPES)


def test_training_shows_all_other_pairs(train):
    assert len(set.union(*map(pairs, train))) == len(COLORS) * len(SHAPES) - len(UNSEEN_PAIRS)


def test_scenes_are_as_rich_as_promised(train):
    assert {len(scene.shapes) for scene in train} == {1, 2, 3, 4}
    assert {shape.size for scene in train for shape in scene.shapes} == {"small", "large"}
    assert {shape.place for scene in train for shape in scene.shapes} == set(PLACES)
    texts = [scene.text for scene in train if scene.text is not None]
    assert 0.35 < len(texts) / len(train) < 0.45
    assert {text.row for text in texts} == set(ROWS)
    assert {text.kind for text in texts} == {"word", "number"}


def test_cells_cover_whole_codes_of_eight_pixels():
    assert IMAGE_SIZE % 8 == CELL_SIZE % 8 == 0
    assert CELL_CENTERS == tuple(CELL_SIZE * number + CELL_SIZE // 2 for number in range(3))


@pytest.mark.parametrize(
    ("ground", "kinds"),
    [
        ("plain", {("plain", "strong"): 1.0}),
        ("flat", {("plain", "strong"): 0.5, ("gradient", "strong"): 0.25, ("stripes", "strong"): 0.25}),
        ("textured", {("texture", "strong"): 1.0}),
        (
            "mixed",
            {
                ("plain", "strong"): 0.25,
                ("gradient", "strong"): 0.125,
                ("stripes", "strong"): 0.125,
                ("texture", "soft"): 0.25,
                ("texture", "strong"): 0.25,
            },
        ),
    ],
)
def test_a_ground_is_a_known_mixture_of_backgrounds(ground, kinds):
    found = [Scenes(0, "train", ground=ground)[index].background for index in range(800)]
    shares = {kind: sum((one.kind, one.strength) == kind for one in found) / len(found) for kind in kinds}
    assert shares == pytest.approx(kinds, abs=0.05)
    assert sum(shares.values()) == 1


def test_another_ground_changes_the_background_alone():
    for index in range(20):
        scenes = [Scenes(0, "test", ground=ground)[index] for ground in GROUNDS]
        assert len({(scene.shapes, scene.text, scene.jitter) for scene in scenes}) == 1


def test_a_fifth_of_the_scenes_hold_a_group_of_like_shapes(train):
    groups = [scene for scene in train if len(pairs(scene)) < len(scene.shapes)]
    assert 0.18 < len(groups) / len(train) < 0.28


def test_shapes_stand_in_raster_order_on_places_of_their_own_beside_the_text(train):
    for scene in train:
        order = [PLACES.index(shape.place) for shape in scene.shapes]
        assert order == sorted(set(order))
        assert scene.text is None or all(ROWS[shape.row] != scene.text.row for shape in scene.shapes)


def test_jitter_is_at_most_one_pixel(train):
    assert {value for scene in train for offset in scene.jitter for value in offset} == {-1, 0, 1}


def test_words_differ_from_each_other_in_at_least_two_letters():
    assert len(set(WORDS)) == 24 and {len(word) for word in WORDS} == {3}
    for index, word in enumerate(WORDS):
        for other in WORDS[index + 1 :]:
            assert sum(a != b for a, b in zip(word, other, strict=True)) >= 2, (word, other)


@pytest.mark.parametrize("content", WORDS + NUMBERS)
def test_texts_are_large_and_fit_with_their_jitter(content):
    rows, columns = np.nonzero(text_mask(content) > 0.05)
    assert 18 <= rows.max() - rows.min() + 1 <= 20
    assert rows.min() >= 1 and rows.max() <= 22 and columns.min() >= 1 and columns.max() <= 70


@pytest.mark.parametrize(
    ("place", "x", "y"), [("top left", 12, 12), ("center", 36, 36), ("right", 60, 36), ("bottom", 36, 60)]
)
def test_a_shape_is_drawn_in_its_color_at_its_place_and_nowhere_else(place, x, y):
    scene = Scene((Shape("blue", "square", "small", place),), background=Background("plain", (250, 250, 250)))
    pixels = scene.pixels()
    assert np.abs(pixels[y, x].astype(int) - COLORS["blue"]).max() <= 1
    rows, columns = np.nonzero((pixels != 250).any(axis=-1))
    assert abs((rows.min() + rows.max() + 1) / 2 - y) <= 0.5
    assert abs((columns.min() + columns.max() + 1) / 2 - x) <= 0.5
    assert rows.max() - rows.min() + 1 <= 14


def test_jitter_moves_a_shape_right_and_down():
    shape = Shape("red", "cross", "large", "center")
    middle, moved = Scene((shape,)).pixels(), Scene((shape,), jitter=((1, -1),)).pixels()
    assert np.array_equal(np.roll(middle, (-1, 1), axis=(0, 1)), moved)


def test_a_ring_is_hollow():
    ring = Shape("red", "ring", "small", "center")
    pixels = Scene((ring,), background=Background("plain", (220, 233, 250))).pixels()
    assert tuple(pixels[36, 36]) == (220, 233, 250)
    assert np.abs(pixels[36, 31].astype(int) - COLORS["red"]).max() <= 6


def test_a_gradient_runs_from_one_tint_to_the_other():
    pixels = background_pixels(Background("gradient", (250, 250, 250), (220, 233, 250), vertical=False))
    assert pixels[5, 0].tolist() == [250, 250, 250] and pixels[5, 71].tolist() == [220, 233, 250]
    assert (pixels == pixels[:1]).all()


def test_a_shape_is_shaded_slightly_from_its_top_left_corner():
    scene = Scene((Shape("blue", "square", "large", "center"),))
    first, last = (scene.pixels()[place, place].astype(float) for place in (28, 43))
    assert (first > last).all()
    assert np.abs(first - last).max() <= 0.1 * max(COLORS["blue"])


def test_a_texture_depends_on_its_seed_and_varies_in_grey_and_color():
    tint = (226, 228, 232)
    strong, again, soft, other = (
        background_pixels(Background("texture", tint, strength=strength, seed=seed))
        for strength, seed in (("strong", 1), ("strong", 1), ("soft", 1), ("strong", 2))
    )
    assert np.array_equal(strong, again) and not np.allclose(strong, other)
    assert 15 < strong.std(axis=(0, 1)).mean() < 35 and 7 < soft.std(axis=(0, 1)).mean() < 18
    assert (strong[..., 0] - strong[..., 2]).std() > 5


def test_glyphs_stand_in_cells_of_their_own():
    word = text_mask("cat")
    assert np.array_equal(word[:, 24:48], text_mask("van")[:, 24:48])
    number = text_mask("42")
    assert number[:, :12].max() == number[:, 60:].max() == 0
    assert shape_mask("ring", "small").shape == (24, 24)


def test_stripes_are_faint():
    pixels = background_pixels(Background("stripes", (240, 240, 240), period=4))
    assert np.unique(pixels).tolist() == [236, 244]
    assert pixels[:4, 0, 0].tolist() == [244, 244, 236, 236]


def test_render_is_a_72_pixel_rgb_image_of_the_pixels():
    scene = Scene((Shape("red", "circle", "small", "top"),), Text("cat", "bottom"))
    image = scene.render()
    assert image.mode == "RGB" and image.size == (72, 72)
    assert np.array_equal(np.asarray(image), scene.pixels())


def test_a_length_ends_the_scenes():
    scenes = Scenes(0, "train", length=3)
    assert len(scenes) == 3 and len(list(scenes)) == 3
    with pytest.raises(IndexError, match=r"scene 3 is outside of 0\.\.2"):
        scenes[3]
    with pytest.raises(TypeError, match="give Scenes a length"):
        len(Scenes(0, "train"))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown split 'valid': expected 'train', 'test' or 'unseen'"):
        Scenes(0, "valid")
    with pytest.raises(ValueError, match="unknown ground 'grass': expected plain, flat, textured, mixed"):
        Scenes(0, "train", ground="grass")
    with pytest.raises(ValueError, match="must not be negative, got seed -1"):
        Scenes(-1, "train")
