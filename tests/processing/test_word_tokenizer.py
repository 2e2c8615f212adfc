"""The word-level tokenizer: exact words in, print-like text out, and nothing unknown in silence."""

import pytest
from transformers import AutoTokenizer

from ett.processing_ett import build_word_tokenizer, unknown_words


@pytest.mark.parametrize(
    "text",
    [
        "a red circle, at the top.",
        "what color is it?",
        "a red circle at the top.\na blue square",
        "a\n\na",
    ],
)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_case_and_spacing_are_normalised(tokenizer):
    assert tokenizer.decode(tokenizer("  A RED   circle ,at the top .")["input_ids"]) == "a red circle, at the top."


def test_numbers_are_spelled_digit_by_digit_and_read_as_one_word():
    tokenizer = build_word_tokenizer(["it says 42 24"])
    ids = tokenizer("it says 42 24")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "it says 42 24"


def test_spelled_words_share_the_tokens_of_their_letters():
    tokenizer = build_word_tokenizer(["the word, catalog"], spelled=["cat", "tac"])
    ids = tokenizer("the word cat, tac")["input_ids"]
    assert tokenizer.decode(ids) == "the word cat, tac"
    assert ids[3] == ids[7] and len(ids) == 9
    assert len(tokenizer("catalog")["input_ids"]) == 1
    assert unknown_words(tokenizer, "a cat and a dog") == ["a", "and", "dog"]


def test_brackets_hyphens_and_apostrophes_are_set_as_in_print():
    tokenizer = build_word_tokenizer(["what's left-hand (a)"])
    assert tokenizer.decode(tokenizer("What's (a) left-hand")["input_ids"]) == "what's (a) left-hand"


def test_each_word_mark_and_line_break_is_one_token(tokenizer):
    assert tokenizer.tokenize("a red circle, at the top.\n") == [
        "a",
        "red",
        "circle",
        ",",
        "at",
        "the",
        "top",
        ".",
        "\n",
    ]


def test_special_tokens_are_never_split_and_are_skipped_on_request(tokenizer):
    ids = tokenizer("<|im_start|>user\n<image> red<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "user", "\n", "<image>", "red", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nred"


def test_words_of_the_chat_template_are_always_known():
    tokenizer = build_word_tokenizer([])
    assert unknown_words(tokenizer, "<|im_start|>system\nuser assistant describe the image.<|im_end|>\n") == []


def test_the_same_vocabulary_gives_the_same_ids_in_any_order():
    one, other = build_word_tokenizer(["red", "blue"]), build_word_tokenizer(["Blue", "red", "red"])
    assert one.get_vocab() == other.get_vocab()


def test_unknown_words_are_named_once_and_in_order(tokenizer):
    assert unknown_words(tokenizer, "a zebra, a Yak and a zebra") == ["zebra", "Yak", "and"]


def test_saving_keeps_behaviour(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.decode(loaded("A red circle, at the top.")["input_ids"]) == "a red circle, at the top."
    assert (loaded.padding_side, loaded.eos_token, loaded.pad_token) == ("left", "<|im_end|>", "<pad>")
    assert set(loaded.all_special_tokens) == set(tokenizer.all_special_tokens)
