"""What is said about scenes is true, unambiguous, varied and within the vocabulary."""

from collections import Counter

import numpy as np
import pytest

from ett.scenes_ett import (
    CHANCE,
    COLORS,
    NUMBERS,
    PLACES,
    QUESTION_TYPES,
    SHAPES,
    WORDS,
    Scene,
    Scenes,
    Shape,
    Text,
    caption,
    drawing_pair,
    parse_caption,
    questions,
    split_words,
    vocabulary,
)

RED_CIRCLE = Shape("red", "circle", "small", "top left")
BLUE_SQUARE = Shape("blue", "square", "large", "center")
SCENE = Scene((RED_CIRCLE, BLUE_SQUARE), Text("cat", "bottom"))


@pytest.fixture(scope="module")
def scenes():
    return [Scenes(1, split)[index] for split in ("train", "unseen") for index in range(1000)]


def ask(scene, seed=0):
    return questions(scene, np.random.default_rng(seed))


def asked(scene, question_type, answer=None, draws=40):
    """All wordings of the questions of one type."""
    return {
        item.question
        for seed in range(draws)
        for item in ask(scene, seed)
        if item.type == question_type and answer in (None, item.answer)
    }


def test_equal_generators_give_equal_words(scenes):
    for index, scene in enumerate(scenes[:50]):
        assert caption(scene, np.random.default_rng(index)) == caption(scene, np.random.default_rng(index))
        assert ask(scene, index) == ask(scene, index)


def test_a_caption_reads_back_as_its_scene(scenes):
    for index, scene in enumerate(scenes):
        assert parse_caption(caption(scene, np.random.default_rng(index))) == (scene.shapes, scene.text)


def test_captions_are_varied_short_lower_case_sentences(scenes):
    captions = {caption(SCENE, np.random.default_rng(seed)) for seed in range(300)}
    assert len(captions) == 2 * 3 * 2 * 3
    assert "top left a small red circle, center a large blue square, and the word cat at the bottom." in captions
    for index, scene in enumerate(scenes):
        words = caption(scene, np.random.default_rng(index))
        assert words.endswith(".") and words == words.lower() and len(words.split()) <= 45


def test_a_caption_in_unknown_words_reads_back_as_nothing():
    assert parse_caption("a photograph of a dog, the word cat") == ((), None)


def test_a_caption_reads_back_whatever_its_case_and_spacing():
    assert parse_caption("Top left  a small RED circle , it says 42 . At the bottom it says 42 .") == (
        (RED_CIRCLE,),
        Text("42", "bottom"),
    )


def test_every_type_of_question_is_asked_with_every_kind_of_answer(scenes):
    answers = {question_type: set() for question_type in QUESTION_TYPES}
    for index, scene in enumerate(scenes):
        for item in ask(scene, index):
            answers[item.type].add(item.answer)
    readings = answers.pop("reading")
    assert set(WORDS) <= readings <= {*WORDS, *NUMBERS}
    assert answers == {
        "colour": set(COLORS),
        "shape": set(SHAPES),
        "count": {"one", "two", "three", "four"},
        "position": set(PLACES),
        "relation": {"yes", "no"},
    }


def test_chance_is_a_uniform_guess_among_the_answers():
    assert CHANCE == {
        "colour": 1 / 8,
        "shape": 1 / 5,
        "count": 1 / 4,
        "position": 1 / 9,
        "relation": 1 / 2,
        "reading": 1 / 114,
    }


def test_questions_by_place_are_always_asked():
    assert {"what color is the shape at the center?", "what color is the center shape?"} <= asked(
        SCENE, "colour", "blue"
    )
    assert asked(SCENE, "shape", "circle") >= {"what shape is at the top left?", "which shape is at the top left?"}


def test_a_thing_is_named_by_kind_or_color_only_if_that_singles_it_out():
    assert "what color is the circle?" in asked(SCENE, "colour", "red")
    assert "what shape is red?" in asked(SCENE, "shape", "circle")
    blue_circle, red_ring = Shape("blue", "circle", "large", "center"), Shape("red", "ring", "small", "right")
    two_circles = Scene((RED_CIRCLE, blue_circle, red_ring))
    assert not any(question.endswith(("the circle?", "the circle have?")) for question in asked(two_circles, "colour"))
    assert not any("red" in question for question in asked(two_circles, "shape"))
    assert asked(two_circles, "position", "center") == {
        "where is the blue circle?",
        "at which place is the blue circle?",
    }


def test_position_and_relation_are_not_asked_of_twins():
    twins = Scene((RED_CIRCLE, Shape("red", "circle", "large", "center")))
    assert asked(twins, "position") == set() and asked(twins, "relation") == set()


def test_all_shapes_and_like_shapes_are_counted():
    group = Scene((RED_CIRCLE, Shape("red", "circle", "small", "center"), Shape("blue", "ring", "small", "right")))
    assert asked(group, "count", "three") == {
        "how many shapes are there?",
        "how many shapes do you see?",
        "count the shapes.",
    }
    assert asked(group, "count", "two") == {
        "how many red circles are there?",
        "how many red circles do you see?",
        "count the red circles.",
    }
    assert asked(group, "count", "one") == set()


def test_the_answers_to_relation_questions_are_right():
    assert {"is the red circle above the blue square?", "is the blue square right of the red circle?"} <= asked(
        SCENE, "relation", "yes", draws=200
    )
    assert {"is the red circle below the blue square?", "does the blue square lie left of the red circle?"} <= asked(
        SCENE, "relation", "no", draws=200
    )
    assert asked(SCENE, "relation", "yes", 200) & asked(SCENE, "relation", "no", 200) == set()


def test_relations_are_asked_only_where_rows_or_columns_differ():
    side_by_side = Scene((RED_CIRCLE, Shape("blue", "square", "large", "top")))
    asked_about = asked(side_by_side, "relation")
    assert asked_about and all("left of" in question or "right of" in question for question in asked_about)


def test_yes_is_as_frequent_as_no(scenes):
    answers = Counter(
        item.answer for index, scene in enumerate(scenes) for item in ask(scene, index) if item.type == "relation"
    )
    assert 0.47 < answers["yes"] / answers.total() < 0.53


def test_reading_is_asked_only_where_something_is_written():
    assert asked(SCENE, "reading", "cat") == {"what does the text say?", "what is written?", "which word is written?"}
    assert asked(Scene((RED_CIRCLE,)), "reading") == set()


def test_no_question_of_a_scene_has_two_answers(scenes):
    for scene in scenes[:200]:
        items = {(item.question, item.answer) for seed in range(5) for item in ask(scene, seed)}
        assert len({question for question, _ in items}) == len(items)


def test_answers_are_one_or_two_words(scenes):
    assert {len(item.answer.split()) for scene in scenes for item in ask(scene)} == {1, 2}


def test_the_vocabulary_is_exactly_what_the_texts_contain(scenes):
    used = set()
    for index, scene in enumerate(scenes):
        used |= set(split_words(caption(scene, np.random.default_rng(index))))
        for item in ask(scene, index):
            used |= {*split_words(item.question), *split_words(item.answer)}
        used |= set(split_words(drawing_pair(0, "train", index)[0].text))
    words = vocabulary()
    assert used <= set(words)
    assert set(words) - used <= set(NUMBERS)
    assert words == sorted(set(words)) and set(NUMBERS) <= set(words)


def test_words_are_split_from_punctuation():
    assert split_words("Where is the red circle?") == ["where", "is", "the", "red", "circle", "?"]
