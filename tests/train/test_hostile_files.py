"""Damaged records and shards: one sentence, and no reader's own error."""

import pytest

from ett.processing_ett import build_word_tokenizer
from ett.train import load_recipe, read_record
from ett.train.models.building import new_language_model
from ett.train.planning.plan import count_examples, model_without_weights


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, "\ufeff{}"])
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    (tmp_path / "training.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"training\.json' (is no JSON|holds a list)"):
        read_record(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("shard.tar", b"no tar" * 999), ("rows.jsonl", b"")])
def test_a_plan_says_where_no_row_can_be_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = count_examples(load_recipe("stage1_alignment", [f"data.source={tmp_path / name}"]).data)
    assert found == "none that can be read" or found.startswith("cannot be read: ")


def test_a_plan_of_a_new_language_model_filters_its_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a red circle"}\n{"text": "a"}\n')
    sizes = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"
    parts = ["model.vision_tokenizer={}", f"model.language_model={sizes}"]
    filters = "data.filters=[{type: caption_length, min_words: 2}]"
    recipe = load_recipe("demo_language", [*parts, f"data.source={tmp_path / 'rows.jsonl'}", filters])
    assert model_without_weights(recipe).config.text_config.vocab_size > 10


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen3_nonsense"},
        {"hidden_size": -8},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 2**31},
        {"rope_parameters": [1]},
    ],
)
def test_a_new_language_model_that_cannot_be_built_is_one_sentence(fields):
    with pytest.raises(ValueError) as caught:
        new_language_model(fields, build_word_tokenizer(["a"]))
    assert str(caught.value).startswith("model.language_model") and "\n" not in str(caught.value)
