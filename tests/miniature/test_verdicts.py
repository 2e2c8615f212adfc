"""Rules that say whether a stage or a score shows learning."""

import math

import pytest

from ett.miniature_ett.verdicts import ATTRIBUTE_CHANCE, PROMPT_CHANCE, has_learned, is_at_chance, loss_change
from ett.scenes_ett import PROMPT_CATEGORIES, drawing_pair, satisfies


def stage(**losses):
    """A stage whose history has one entry for each value."""
    return {"history": [dict(zip(losses, values, strict=True)) for values in zip(*losses.values(), strict=True)]}


def test_a_loss_that_falls_has_learned():
    assert has_learned(stage(loss=[3.0] * 2 + [2.0] * 16 + [1.0] * 2))


def test_a_loss_that_falls_by_less_than_a_tenth_has_not_learned():
    assert not has_learned(stage(loss=[1.0, 0.95, 0.91]))
    assert has_learned(stage(loss=[1.0, 0.95, 0.89]))


def test_tenths_are_compared_and_not_single_values():
    values = [2.0, 1.0] + [1.0] * 16 + [0.4, 1.0]
    assert loss_change(stage(loss=values)) == ("loss", 1.5, 0.7)


def test_a_fall_within_the_first_steps_alone_is_no_learning():
    assert not has_learned(stage(loss=[6.2] + [5.5] * 59))


@pytest.mark.parametrize("values", [[], [1.0], [2.0, math.nan], [math.nan, 1.0]])
def test_without_two_finite_losses_a_stage_has_not_learned(values):
    assert not has_learned(stage(loss=values))


def test_the_tokenizer_is_judged_by_its_reconstruction_and_tuning_by_its_captions():
    falling, negative = [0.23, 0.077], [0.5, -0.1]
    assert loss_change(stage(loss=negative, reconstruction_loss=falling)).name == "reconstruction_loss"
    assert not has_learned(stage(loss=falling, reconstruction_loss=falling, caption_loss=[1.2, 1.15]))


@pytest.mark.parametrize(
    ("accuracy", "chance", "count", "expected"),
    [(0.51, 0.5, 200, True), (0.58, 0.5, 200, False), (0.0, 0.1, 50, True), (1.0, 0.5, 1, True), (1.0, 0.5, 0, True)],
)
def test_a_score_is_at_chance_within_two_standard_errors(accuracy, chance, count, expected):
    assert is_at_chance(accuracy, chance, count) is expected


def test_the_chance_of_a_prompt_is_the_score_of_perfect_images_of_other_prompts():
    assert set(PROMPT_CHANCE) == set(PROMPT_CATEGORIES)
    for offset, category in enumerate(PROMPT_CATEGORIES):
        pairs = [drawing_pair(0, "test", offset + 6 * turn) for turn in range(50)]
        right = [
            satisfies(prompt, scene).correct
            for number, (prompt, _) in enumerate(pairs)
            for other, (_, scene) in enumerate(pairs)
            if other != number
        ]
        assert sum(right) / len(right) == pytest.approx(PROMPT_CHANCE[category], abs=0.04), category


def test_every_attribute_of_captions_has_a_chance_or_none():
    assert ATTRIBUTE_CHANCE == pytest.approx(
        {"count": 1 / 4, "place": None, "colour": 1 / 8, "shape": 1 / 5, "size": 1 / 2, "word": 1 / 114}
    )
