"""Drawing prompts, the scenes that go with them, and the verdicts on drawings."""

import pytest

from ett.scenes_ett import (
    PROMPT_CATEGORIES,
    UNSEEN_PAIRS,
    DetectedScene,
    DrawingPrompt,
    Shape,
    Verdict,
    drawing_pair,
    satisfies,
)

CIRCLE, SQUARE, RING = (None, "circle"), (None, "square"), (None, "ring")
RELATED = (CIRCLE, SQUARE)
PROMPTS = {
    "a circle": DrawingPrompt("single object", (CIRCLE,)),
    "a circle and a square": DrawingPrompt("two objects", RELATED),
    "a circle and a circle": DrawingPrompt("two objects", (CIRCLE, CIRCLE)),
    "two rings": DrawingPrompt("counting", (RING,), count=2),
    "three rings": DrawingPrompt("counting", (RING,), count=3),
    "three crosses": DrawingPrompt("counting", ((None, "cross"),), count=3),
    "an orange circle": DrawingPrompt("colors", (("orange", "circle"),)),
    "a red circle": DrawingPrompt("colors", (("red", "circle"),)),
    "a circle above a square": DrawingPrompt("position", RELATED, relation="above"),
    "a circle below a square": DrawingPrompt("position", RELATED, relation="below"),
    "a circle left of a square": DrawingPrompt("position", RELATED, relation="left of"),
    "a circle right of a square": DrawingPrompt("position", RELATED, relation="right of"),
    "a red circle and a red square": DrawingPrompt("color attribution", (("red", "circle"), ("red", "square"))),
    "a red circle and a blue square": DrawingPrompt("color attribution", (("red", "circle"), ("blue", "square"))),
}


def drawn(*looks):
    """A detected scene of shapes given as "color shape place"."""
    shapes = []
    for look in looks:
        color, shape, place = look.split(" ", 2)
        shapes.append(Shape(color, shape, "small", place))
    return DetectedScene(tuple(shapes), None, (250, 250, 250))


def judge(text, *looks):
    return satisfies(PROMPTS[text], drawn(*looks))


@pytest.mark.parametrize("text", PROMPTS)
def test_the_six_forms_are_worded(text):
    assert PROMPTS[text].text == text


@pytest.mark.parametrize("split", ["train", "test", "unseen"])
def test_drawing_pairs_are_deterministic_cycle_the_categories_and_fit_exactly(split):
    for index in range(300):
        prompt, scene = drawing_pair(2, split, index)
        assert (prompt, scene) == drawing_pair(2, split, index)
        assert prompt.category == PROMPT_CATEGORIES[index % 6]
        assert satisfies(prompt, scene).correct
        assert len(scene.shapes) == (prompt.count or len(prompt.objects)) and scene.text is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_for_training_and_testing_hold_no_unseen_pair(split):
    for index in range(600):
        prompt, scene = drawing_pair(0, split, index)
        assert not {(shape.color, shape.shape) for shape in scene.shapes} & UNSEEN_PAIRS
        assert not set(prompt.objects) & UNSEEN_PAIRS


def test_unseen_prompts_that_name_colors_hold_an_unseen_pair():
    for index in range(600):
        prompt, _ = drawing_pair(0, "unseen", index)
        if prompt.category in ("colors", "color attribution"):
            assert set(prompt.objects) & UNSEEN_PAIRS


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        drawing_pair(0, "dev", 0)
    with pytest.raises(ValueError, match="must not be negative, got seed 0 and index -1"):
        drawing_pair(0, "train", -1)


def test_a_single_object_may_have_company():
    assert judge("a circle", "red circle top", "blue ring left") == Verdict(
        True, None, "All that was asked for was found."
    )
    assert judge("a circle", "blue ring left") == Verdict(False, None, "No circle was found.")


def test_two_objects_must_both_be_there():
    assert judge("a circle and a square", "red square top", "red circle left").correct
    assert judge("a circle and a square", "red circle left") == Verdict(False, None, "No square was found.")
    assert judge("a circle and a circle", "red circle left") == Verdict(False, None, "Only one circle was found.")
    assert judge("a circle and a circle", "red circle left", "red circle top").correct


def test_counts_must_be_exact():
    three = ("red ring top", "blue ring left", "red ring right")
    assert judge("three rings", *three, "red circle center") == Verdict(True, None, "Three rings were found.")
    assert judge("two rings", *three) == Verdict(False, None, "Three rings were found.")
    assert judge("two rings", "red ring top") == Verdict(False, None, "One ring was found.")
    assert judge("two rings") == Verdict(False, None, "No rings were found.")


def test_a_color_must_be_on_its_shape_but_counts_as_color_on_any():
    assert judge("a red circle", "red circle top", "blue circle left") == Verdict(
        True, True, "All that was asked for was found."
    )
    assert judge("a red circle", "red ring top") == Verdict(False, True, "No red circle was found.")
    assert judge("a red circle", "blue circle top") == Verdict(False, False, "No red circle was found.")


def test_a_position_is_a_matter_of_rows_or_columns():
    assert judge("a circle above a square", "red circle top left", "red square bottom right").correct
    assert judge("a circle left of a square", "red circle bottom left", "red square top").correct
    assert judge("a circle above a square", "red circle left", "red square right") == Verdict(
        False, None, "The circle is not above the square."
    )
    assert not judge("a circle right of a square", "red circle top", "red square bottom").correct
    assert judge("a circle below a square", "red circle top", "red square left", "blue circle bottom").correct
    assert judge("a circle below a square", "red circle top") == Verdict(False, None, "No square was found.")


def test_colors_must_not_be_exchanged():
    text = "a red circle and a blue square"
    assert judge(text, "red circle top", "blue square left").correct
    assert judge(text, "blue circle top", "red square left") == Verdict(False, True, "No red circle was found.")
    assert judge(text, "red circle top", "red square left") == Verdict(False, False, "No blue square was found.")


def test_two_things_of_one_color_need_that_color_twice():
    text = "a red circle and a red square"
    assert judge(text, "red circle top", "blue square left").color_correct is False
    assert judge(text, "red circle top", "red square left") == Verdict(True, True, "All that was asked for was found.")
