"""Filters: which rows each keeps, what it reads for that, and what is counted."""

import doctest
import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFile

import train.data.filters
from train.data.filters import Columns, NearDuplicates, build_filter
from train.data.selection import FilterChain, select_rows, summarize


def encoded(picture, kind="PNG"):
    with io.BytesIO() as file:
        picture.save(file, kind)
        return {"bytes": file.getvalue(), "path": None}


def blank(width, height):
    return encoded(Image.new("RGB", (width, height)))


def noise(seed, side=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8))


def keeps(setting, row, **columns):
    return FilterChain([setting], Columns(**columns)).keep([row])[0]


def rows_of(pictures, **columns):
    features = datasets.Features(
        {"image": datasets.Image(decode=False), **{name: datasets.Value("string") for name in columns}}
    )
    return datasets.Dataset.from_dict({"image": pictures, **columns}, features=features)


CORRUPT = {"bytes": b"no picture", "path": None}


# Each filter


@pytest.mark.parametrize(("width", "height", "kept"), [(512, 512, True), (900, 512, True), (511, 900, False)])
def test_resolution_is_that_of_the_shorter_side(width, height, kept):
    assert keeps({"type": "resolution", "min_side": 512}, {"image": blank(width, height)}) is kept


@pytest.mark.parametrize(("width", "height", "kept"), [(20, 10, True), (10, 20, True), (21, 10, False)])
def test_aspect_ratio_is_the_longer_side_by_the_shorter(width, height, kept):
    assert keeps({"type": "aspect_ratio", "max": 2.0}, {"image": blank(width, height)}) is kept


@pytest.mark.parametrize(("words", "kept"), [(2, False), (3, True), (5, True), (6, False)])
def test_captions_have_a_least_and_a_largest_number_of_words(words, kept):
    setting = {"type": "caption_length", "min_words": 3, "max_words": 5}
    assert keeps(setting, {"text": " ".join(["word"] * words)}) is kept


def test_captions_are_not_bounded_above_unless_asked_for_and_missing_ones_have_no_words():
    assert keeps({"type": "caption_length"}, {"text": "word " * 1000})
    assert not keeps({"type": "caption_length"}, {"text": None})


def test_of_several_pictures_or_captions_each_has_to_pass():
    setting = {"type": "resolution", "min_side": 8}
    assert keeps(setting, {"image": [blank(8, 8), blank(9, 9)]})
    assert not keeps(setting, {"image": [blank(8, 8), blank(7, 9)]})
    assert not keeps({"type": "caption_length", "min_words": 2}, {"text": ["two words", "one"]})


@pytest.mark.parametrize("kind", ["resolution", "aspect_ratio"])
def test_of_a_pictures_size_the_header_is_read_and_no_pixel(kind, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    setting = {"resolution": {"min_side": 4}, "aspect_ratio": {"max": 2}}[kind]
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        assert keeps({"type": kind, **setting}, {"image": encoded(Image.new("RGB", (8, 8)), name)})


def test_a_row_without_a_picture_passes_what_looks_at_pictures():
    for setting in ({"type": "resolution", "min_side": 8}, {"type": "near_duplicates"}):
        assert keeps(setting, {"image": None})


def test_a_picture_that_cannot_be_read_is_left_for_the_reader_to_name():
    settings = [{"type": "resolution", "min_side": 8}, {"type": "aspect_ratio", "max": 2}, {"type": "near_duplicates"}]
    chain = FilterChain(settings)
    assert chain.keep([{"image": CORRUPT}, {"image": CORRUPT}]) == [True, True]
    assert chain.removed == [0, 0, 0]


def test_a_score_that_the_data_hold_is_compared_and_a_missing_one_removes_the_row():
    chain = FilterChain([{"type": "aesthetic", "min_score": 5.0, "column": "score"}])
    assert chain.keep([{"score": 5.0}, {"score": 4.9}, {"score": None}]) == [True, False, False]


def test_a_score_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="The column 'score' holds 'high'; expected aesthetic scores"):
        keeps({"type": "aesthetic", "min_score": 5.0, "column": "score"}, {"score": "high"})


def test_a_filter_reads_the_columns_that_the_data_have():
    assert keeps({"type": "resolution", "min_side": 8}, {"photo": blank(8, 8)}, image="photo")
    assert not keeps({"type": "caption_length", "min_words": 2}, {"title": "one"}, text="title")


# Near duplicates


def test_the_hashs_example_is_true():
    assert doctest.testmod(train.data.filters).attempted > 0
    assert doctest.testmod(train.data.filters).failed == 0


def test_a_picture_in_another_size_and_file_format_is_a_near_duplicate_and_another_picture_is_not():
    scene = noise(0, 9).resize((96, 96), Image.Resampling.BICUBIC)
    other = noise(1, 9).resize((96, 96), Image.Resampling.BICUBIC)
    chain = FilterChain([{"type": "near_duplicates", "distance": 4}])
    rows = [encoded(scene), encoded(scene.resize((64, 64)), "JPEG"), encoded(other), encoded(other.rotate(180))]
    assert chain.keep([{"image": row} for row in rows]) == [True, False, True, True]


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 12, 63])
def test_near_duplicates_are_those_that_comparing_with_every_former_one_finds(distance, monkeypatch):
    rng = np.random.default_rng(distance)
    originals = [int(number) for number in rng.integers(0, 2**63, 20)]
    hashes = []
    for number in rng.permutation(20).repeat(5):
        flips = rng.choice(64, size=rng.integers(0, min(63, 2 * distance + 2)), replace=False)
        hashes.append(originals[number] ^ sum(1 << int(bit) for bit in flips))
    kept, expected = [], []
    for number in hashes:
        expected.append(all((number ^ other).bit_count() > distance for other in kept))
        kept += [number] * expected[-1]
    monkeypatch.setattr(train.data.filters, "difference_hash", lambda picture: hashes[picture])
    monkeypatch.setattr(train.data.filters, "open_pictures", lambda cell: [cell])
    step = NearDuplicates(distance=distance)
    assert step.keep([{"image": index} for index in range(100)]) == expected
    assert expected.count(False) > 10 or distance == 0


def test_of_several_pictures_one_that_is_new_keeps_the_row():
    first, second = encoded(noise(0)), encoded(noise(1))
    chain = FilterChain([{"type": "near_duplicates"}])
    rows = [{"image": [first]}, {"image": [first, second]}, {"image": [second, first]}]
    assert chain.keep(rows) == [True, True, False]


def test_what_a_stream_has_seen_is_restored_from_its_state_and_forgotten_for_a_new_epoch():
    chain = FilterChain([{"type": "near_duplicates"}])
    rows = [{"image": encoded(noise(seed))} for seed in (0, 1, 0)]
    chain.keep(rows[:2])
    resumed = FilterChain([{"type": "near_duplicates"}])
    resumed.load_state_dict(json.loads(json.dumps(chain.state_dict())))
    assert resumed.keep(rows[2:]) == [False]
    assert resumed.seen == [3]
    resumed.forget()
    assert resumed.keep(rows[2:]) == [True]
    assert (resumed.seen, resumed.removed) == ([4], [1])


# Chains


def test_a_filter_sees_what_those_before_it_kept():
    settings = [{"type": "caption_length", "min_words": 2}, {"type": "resolution", "min_side": 8}]
    chain = FilterChain(settings)
    rows = [
        {"text": "a circle", "image": blank(8, 8)},
        {"text": "circle", "image": blank(4, 4)},
        {"text": "a square", "image": blank(4, 4)},
    ]
    assert chain.keep(rows) == [True, False, False]
    assert chain.report() == [{**settings[0], "seen": 3, "removed": 1}, {**settings[1], "seen": 2, "removed": 1}]
    assert summarize(chain.report()) == "caption_length removed 1 of 3, resolution removed 1 of 2"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"type": "resolutoin"}, "unknown type 'resolutoin'. Did you mean 'resolution'?"),
        ({"min_side": 4}, "expected a mapping such as {type: resolution, min_side: 512}"),
        ("resolution", "data.filters has 'resolution'; expected a mapping"),
        (
            {"type": "resolution", "min_size": 4},
            "resolution has an unknown field 'min_size'. Did you mean 'min_side'?",
        ),
        ({"type": "resolution", "columns": 4}, "resolution has an unknown field 'columns'"),
        ({"type": "resolution"}, "The filter resolution needs the field 'min_side'."),
        (
            {"type": "resolution", "min_side": "big"},
            "min_side of the filter resolution is 'big'; expected a whole number",
        ),
        ({"type": "aspect_ratio", "max": 0.5}, "max of the filter aspect_ratio is 0.5; expected a number, 1 or more"),
        ({"type": "caption_length", "min_words": 9, "max_words": 3}, "is 3; expected a whole number, 9 or more"),
        ({"type": "near_duplicates", "distance": 64}, "is 64; expected a whole number, 0 to 63"),
        ({"type": "aesthetic", "min_score": True}, "min_score of the filter aesthetic is True; expected a number"),
    ],
)
def test_a_setting_that_cannot_be_used_is_an_error(setting, message):
    with pytest.raises(ValueError) as caught:
        build_filter(setting, Columns())
    assert message in str(caught.value)


# Data sets


def test_rows_are_selected_in_their_order_and_counted():
    rows = rows_of([blank(side, 20) for side in range(1, 200)])
    chain = FilterChain([{"type": "resolution", "min_side": 10}, {"type": "aspect_ratio", "max": 2}])
    kept = select_rows(rows, chain, progress=False)
    widths = [Image.open(io.BytesIO(row["image"]["bytes"])).width for row in kept]
    assert widths == list(range(10, 41))
    assert (chain.seen, chain.removed) == ([199, 190], [9, 159])


def test_filters_of_captions_are_given_captions_alone(monkeypatch):
    given = []
    original = FilterChain.keep
    monkeypatch.setattr(FilterChain, "keep", lambda self, rows: given.extend(rows) or original(self, rows))
    rows = rows_of([CORRUPT] * 2, text=["one", "two words"])
    kept = select_rows(rows, FilterChain([{"type": "caption_length", "min_words": 2}]), progress=False)
    assert given == [{"text": "one"}, {"text": "two words"}]
    assert kept["text"][:] == ["two words"] and "image" in kept.column_names


def test_the_same_filters_do_not_look_at_the_same_rows_again(monkeypatch):
    rows = rows_of([blank(8, 8), blank(4, 4)])
    setting = {"type": "resolution", "min_side": 8}
    select_rows(rows, FilterChain([setting]), progress=False)
    monkeypatch.setattr(FilterChain, "keep", lambda self, rows: pytest.fail("looked again"))
    again = FilterChain([setting])
    assert len(select_rows(rows, again, progress=False)) == 1
    assert (again.seen, again.removed) == ([2], [1])
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        select_rows(rows, FilterChain([{**setting, "min_side": 7}]), progress=False)


def test_a_column_that_the_data_do_not_have_is_an_error_before_any_row_is_read():
    with pytest.raises(
        ValueError, match=r"read the column 'score', which the data do not have; their columns are 'im"
    ):
        select_rows(rows_of([CORRUPT]), FilterChain([{"type": "aesthetic", "min_score": 5, "column": "score"}]))


def test_filters_that_leave_nothing_are_an_error_that_says_which_removed_what():
    with pytest.raises(ValueError, match="leave none of the 1 rows: resolution removed 1 of 1"):
        select_rows(rows_of([blank(4, 4)]), FilterChain([{"type": "resolution", "min_side": 8}]), progress=False)
