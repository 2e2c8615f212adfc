"""A row that cannot be used is skipped, counted and named, wherever it stands and however the data are read."""

import doctest
import io
import itertools
import json
import re

import pytest
from PIL import Image

import ett.data_ett.captions
from ett.data_ett.filters import Columns, build_filter
from ett.train import load_recipe
from ett.train.examples import build_examples
from ett.train.run import prepare_examples

ROWS = 112

UNUSABLE = {
    "empty": ("", "expected text"),
    "null": (None, "expected text"),
    "over-long": ("red circle " * 200, r"more than data\.max_length=200"),
    "placeholder": ("a red <image> circle", "placeholders <image> in its text"),
    "unknown word": ("a red quokka", "'quokka' is beyond this model's vocabulary"),
}


@pytest.fixture
def prepare(tmp_path, processor):
    """Makes prepared captions of the given texts, of images `0.png` and so on."""

    def make(texts, streaming=False):
        for number in range(len(texts)):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(content, format="PNG")
            (tmp_path / f"{number}.png").write_bytes(content.getvalue())
        rows = [json.dumps({"image": f"{number}.png", "text": text}) for number, text in enumerate(texts)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        overrides = [f"data.source={tmp_path / 'rows.jsonl'}", f"data.streaming={streaming}"]
        recipe = load_recipe("stage2_semantic", [*overrides, "data.max_length=200", "training.max_steps=1"])
        return prepare_examples(recipe, build_examples(recipe, 0), processor, 0)

    return make


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("place", [3, 110])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_row_is_skipped_counted_and_named(prepare, kind, place, streaming):
    text, reason = UNUSABLE[kind]
    texts = ["red circle"] * ROWS
    texts[place] = text
    prepared = prepare(texts, streaming)
    if streaming:
        items = list(itertools.islice(prepared, ROWS))
        skipped = {name: why for item in items for name, why in item["skipped"].items()}
        names = {item["name"] for item in items}
    else:
        items = [prepared[index] for index in (place - 1, place)]
        skipped, names = prepared.skipped, {item["name"] for item in items}
        assert [item["name"] for item in items] == [f"{place - 1}.png", f"{place + 1}.png"]
        assert {name for item in items for name in item.get("skipped", {})} == {f"{place}.png"}
    assert list(skipped) == [f"{place}.png"] and f"{place}.png" not in names
    assert re.search(reason, skipped[f"{place}.png"])


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_where_none_of_the_first_rows_can_be_used_it_is_an_error(prepare, kind, streaming):
    text, reason = UNUSABLE[kind]
    with pytest.raises(ValueError, match=rf"None of the first 100 .*can be used; the first, 0\.png: .*{reason}"):
        prepare([text] * ROWS, streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_caption_that_is_a_number_is_text(prepare, streaming):
    source = prepare(["red circle", "blue circle", 7, 2.5], streaming).examples
    read = (example for example, _ in source.read(0, 1)) if streaming else map(source.__getitem__, range(4))
    texts = [example["text"] for example in itertools.islice(read, 4)]
    assert sorted(texts) == ["2.5", "7", "blue circle", "red circle"]


def test_numbers_have_words():
    keeps = build_filter({"type": "caption_length", "min_words": 1}, Columns()).keeps
    assert keeps({"text": 7}) and not keeps({"text": None}) and not keeps({"text": ""})


def test_the_example_of_captions_is_true():
    results = doctest.testmod(ett.data_ett.captions)
    assert results.attempted > 0 and results.failed == 0
