"""Conversations of public datasets: every usual form to one, and what is wrong with one."""

import doctest
import json

import pytest

import ett.data_ett.conversations
from ett.data_ett.conversations import ExampleError, read_conversation

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def test_the_modules_example_is_true():
    results = doctest.testmod(ett.data_ett.conversations)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("<image>What?", [IMAGE, text("What?")]),
        ("Is this <image> it?", [text("Is this "), IMAGE, text(" it?")]),
    ],
)
def test_a_placeholder_may_stand_anywhere_and_takes_its_line_break_with_it(value, content):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes."}]
    assert read_conversation(turns, 1) == [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Yes."},
    ]


def test_several_images_in_several_turns_keep_their_places():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\n<image>\nWhich is red?"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": "And of <image>?"},
        {"from": "gpt", "value": "No."},
    ]
    messages = read_conversation(turns, 3)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == [IMAGE, IMAGE, text("Which is red?")]
    assert messages[3]["content"] == [text("And of "), IMAGE, text("?")]


def test_messages_of_roles_and_typed_content_are_the_same_as_llavas():
    """Parts as Arrow gives them have every field of any part."""
    typed = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    plain = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]
    llava = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    assert read_conversation(typed, 1) == read_conversation(plain, 1) == read_conversation(llava, 1)


def test_a_conversation_may_be_json_and_need_no_image():
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    assert read_conversation(json.dumps(turns), 0) == turns


def answered(value, role="human"):
    return [{"from": role, "value": value}, {"from": "gpt", "value": "Red."}]


@pytest.mark.parametrize(
    ("cell", "images", "message"),
    [
        (answered("What?"), 1, "has 0 placeholders <image> and the row has 1 images; write one <image>"),
        (answered("<image>\n<image>\nWhat?"), 1, "has 2 placeholders <image> and the row has 1 images"),
        (answered("<image>\nWhat?"), 0, "has 1 placeholders <image> and the row has 0 images"),
        (answered("What?", role="tool"), 0, "A turn's role is 'tool'; expected one of user, human"),
        (answered(None), 0, "A turn's content is None; expected text, or a list of parts"),
        (answered([{"type": "image_url", "image_url": "x"}]), 0, "A part of a turn is"),
        (answered("What?")[:1], 0, "has no answer"),
        ([*answered("What?"), {"from": "gpt", "value": "<image>"}], 1, "the assistant holds an image"),
        ("no json", 0, "The conversation is 'no json'; expected a list of turns, or its JSON"),
        ([], 0, "expected a list of turns"),
        (["hello"], 0, "A turn is 'hello'; expected a dict of role and content"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(cell, images, message):
    with pytest.raises(ExampleError) as caught:
        read_conversation(cell, images)
    assert message in str(caught.value)
