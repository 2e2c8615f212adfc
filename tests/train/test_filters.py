"""Filters: which rows each keeps, what it reads for that, and what is counted."""

import doctest
import io
import itertools
import json
import tarfile

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image, ImageFile
from typer.testing import CliRunner

import ett.data_ett.filters
from ett.cli import app
from ett.data_ett.filters import Columns, NearDuplicates, build_filter
from ett.data_ett.selection import FilterChain, select_rows, summarize
from ett.train.examples import build_examples
from ett.train.recipes import DataSection, Recipe


def encoded(image, kind="PNG"):
    with io.BytesIO() as file:
        image.save(file, kind)
        return {"bytes": file.getvalue(), "path": None}


def blank(width, height):
    return encoded(Image.new("RGB", (width, height)))


def noise(seed, side=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8))


def keeps(setting, row, **columns):
    return FilterChain([setting], Columns(**columns)).keep([row])[0]


def rows_of(images, **columns):
    features = datasets.Features(
        {"image": datasets.Image(decode=False), **{name: datasets.Value("string") for name in columns}}
    )
    return datasets.Dataset.from_dict({"image": images, **columns}, features=features)


CORRUPT = {"bytes": b"no image", "path": None}


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


def test_of_several_images_or_captions_each_has_to_pass():
    setting = {"type": "resolution", "min_side": 8}
    assert keeps(setting, {"image": [blank(8, 8), blank(9, 9)]})
    assert not keeps(setting, {"image": [blank(8, 8), blank(7, 9)]})
    assert not keeps({"type": "caption_length", "min_words": 2}, {"text": ["two words", "one"]})


@pytest.mark.parametrize("kind", ["resolution", "aspect_ratio"])
def test_of_an_images_size_the_header_is_read_and_no_pixel(kind, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    setting = {"resolution": {"min_side": 4}, "aspect_ratio": {"max": 2}}[kind]
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        assert keeps({"type": kind, **setting}, {"image": encoded(Image.new("RGB", (8, 8)), name)})


def test_a_row_without_an_image_passes_what_looks_at_images():
    for setting in ({"type": "resolution", "min_side": 8}, {"type": "near_duplicates"}):
        assert keeps(setting, {"image": None})


def test_an_image_that_cannot_be_read_is_left_for_the_reader_to_name():
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
    assert doctest.testmod(ett.data_ett.filters).attempted > 0
    assert doctest.testmod(ett.data_ett.filters).failed == 0


def test_an_image_in_another_size_and_file_format_is_a_near_duplicate_and_another_image_is_not():
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
    monkeypatch.setattr(ett.data_ett.filters, "difference_hash", lambda image: hashes[image])
    monkeypatch.setattr(ett.data_ett.filters, "open_images", lambda cell, folder: [cell])
    step = NearDuplicates(distance=distance)
    assert step.keep([{"image": index} for index in range(100)]) == expected
    assert expected.count(False) > 10 or distance == 0


def test_of_several_images_one_that_is_new_keeps_the_row():
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


# Datasets


def selected(rows, *settings):
    chain = FilterChain(list(settings))
    return select_rows(rows, chain).tolist(), chain


def test_rows_are_selected_in_their_order_and_counted():
    rows = rows_of([blank(side, 20) for side in range(1, 200)])
    numbers, chain = selected(rows, {"type": "resolution", "min_side": 10}, {"type": "aspect_ratio", "max": 2})
    assert numbers == list(range(9, 40))
    assert (chain.seen, chain.removed) == ([199, 190], [9, 159])


def test_filters_of_captions_are_given_captions_alone(monkeypatch):
    given = []
    original = FilterChain.keep
    monkeypatch.setattr(FilterChain, "keep", lambda self, rows: given.extend(rows) or original(self, rows))
    rows = rows_of([CORRUPT] * 2, text=["one", "two words"])
    assert selected(rows, {"type": "caption_length", "min_words": 2})[0] == [1]
    assert given == [{"text": "one"}, {"text": "two words"}]


def test_the_same_filters_do_not_look_at_the_same_rows_again(monkeypatch):
    rows = rows_of([blank(8, 8), blank(4, 4)])
    setting = {"type": "resolution", "min_side": 8}
    selected(rows, setting)
    monkeypatch.setattr(FilterChain, "keep", lambda self, rows: pytest.fail("looked again"))
    numbers, again = selected(rows, setting)
    assert numbers == [0]
    assert (again.seen, again.removed) == ([2], [1])
    with pytest.raises(pytest.fail.Exception, match="looked again"):
        selected(rows, {**setting, "min_side": 7})


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_replaced_image_file_is_looked_at_again(tmp_path, suffix, several):
    names = [f"{number}.png" for number in range(3)]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    if several and suffix == "csv":
        pytest.skip("CSV holds no lists")
    cells = [[name] for name in names] if several else names
    table = datasets.Dataset.from_dict({"image": cells, "text": ["red"] * 3})
    write = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix]
    write(tmp_path / f"rows.{suffix}")
    chosen = recipe(tmp_path / f"rows.{suffix}", [RESOLUTION])
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert list(build_examples(chosen, 0).numbers) == [0]
    Image.new("RGB", (9, 9)).save(tmp_path / "2.png")
    assert list(build_examples(chosen, 0).numbers) == [0, 2]
    (tmp_path / "0.png").unlink()
    # An image that cannot be read is left for the reader to name.
    assert list(build_examples(chosen, 0).numbers) == [0, 2]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    assert list(build_examples(chosen, 0).numbers) == [2]


def test_filters_that_leave_nothing_are_an_error_that_says_which_removed_what():
    with pytest.raises(ValueError, match="leave none of the 1 rows: resolution removed 1 of 1"):
        selected(rows_of([blank(4, 4)]), {"type": "resolution", "min_side": 8})


# Recipes


@pytest.fixture
def folder(tmp_path):
    """Twelve images of 4 to 15 pixels with captions, of which the fifth cannot be read."""
    root = tmp_path / "images"
    root.mkdir()
    lines = []
    for side in range(4, 16):
        noise(side, side).save(root / f"{side:02}.png")
        lines.append(json.dumps({"file_name": f"{side:02}.png", "text": f"side {side}", "score": side / 2}))
    (root / "08.png").write_bytes(b"no image")
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def tars(folder):
    """The same as three shards of a webdataset."""
    for shard in range(3):
        with tarfile.open(folder.parent / f"{shard}.tar", "w") as tar:
            for side in range(4 + 4 * shard, 8 + 4 * shard):
                files = {"png": (folder / f"{side:02}.png").read_bytes(), "txt": f"side {side}".encode()}
                files["json"] = json.dumps({"score": side / 2}).encode()
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{side:02}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder.parent / "*.tar"


RESOLUTION = {"type": "resolution", "min_side": 8}
SCORE = {"type": "aesthetic", "min_score": 6.5, "column": "score"}


def recipe(source, filters, streaming=False, **data):
    section = DataSection(source=str(source), filters=filters, streaming=streaming, **data)
    return Recipe(task="caption", data=section, training={"max_steps": 1})


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_examples_of_a_recipe_are_those_that_pass_its_filters(form, request, caplog):
    examples = build_examples(recipe(request.getfixturevalue(form), [RESOLUTION]), 0)
    assert len(examples) == 8
    assert [examples[index]["text"] for index in range(8)] == [f"side {max(side, 9)}" for side in range(8, 16)]
    assert examples.filters_report() == [{**RESOLUTION, "seen": 12, "removed": 4}]
    assert [name.rsplit("/")[-1][:2] for name in examples.skipped] == ["08"]


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_a_column_of_the_data_filters_them(form, request):
    examples = build_examples(recipe(request.getfixturevalue(form), [SCORE]), 0)
    assert [examples[index]["text"] for index in range(len(examples))] == ["side 13", "side 14", "side 15"]


def test_a_column_that_the_data_do_not_have_is_an_error(folder):
    with pytest.raises(
        ValueError, match=r"read the column 'points', which the data do not have; their columns are 'im"
    ):
        build_examples(recipe(folder, [{**SCORE, "column": "points"}]), 0)


def test_a_source_of_a_mixture_has_filters_of_its_own(folder, tars):
    mixture = {"files": {"source": str(folder)}, "shards": {"source": str(tars), "filters": [SCORE]}}
    mixed = Recipe(task="caption", data=DataSection(mixture=mixture, filters=[RESOLUTION]))
    assert build_examples(mixed, 0).filters_report() == [
        {"source": "files", **RESOLUTION, "seen": 12, "removed": 4},
        {"source": "shards", **SCORE, "seen": 12, "removed": 9},
    ]


def test_scenes_are_not_filtered():
    with pytest.raises(ValueError, match=r"Scenes are not filtered; remove data\.filters"):
        build_examples(recipe("scenes", [RESOLUTION]), 0)


# Streams


def texts_and_positions(stream, count, position=None, reader=0, readers=1):
    read = list(itertools.islice(stream.read(reader, readers, position), count))
    return [example["text"] for example, _ in read], [after for _, after in read]


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_a_stream_gives_what_passes_the_filters_in_each_epoch(form, request):
    stream = build_examples(recipe(request.getfixturevalue(form), [RESOLUTION], True, shuffle_rows=5), 0)
    texts, positions = texts_and_positions(stream, 14)
    expected = sorted(f"side {side}" for side in range(9, 16))
    assert sorted(texts[:7]) == sorted(texts[7:]) == expected
    assert stream.filters_report([positions[6]]) == [{**RESOLUTION, "seen": 12, "removed": 4}]


def test_a_filtered_stream_goes_on_from_every_position(folder):
    for side in range(4, 16, 2):
        (folder / f"{side:02}.png").write_bytes((folder / "15.png").read_bytes())
    filters = [{"type": "near_duplicates"}, {"type": "caption_length", "min_words": 2}]
    stream = build_examples(recipe(folder, filters, True, shuffle_rows=3), 0)
    texts, positions = texts_and_positions(stream, 18)
    assert len(set(texts[:6])) == 6
    for start, position in enumerate(positions[:12], 1):
        again, after = texts_and_positions(stream, 3, json.loads(json.dumps(position)))
        assert again == texts[start : start + 3]
        assert after == positions[start : start + 3]


def test_counts_of_a_streams_readers_add_up(tars):
    filters = [RESOLUTION, {"type": "near_duplicates"}]
    stream = build_examples(recipe(tars, filters, True), 0)
    last = [texts_and_positions(stream, 1, reader=reader, readers=2)[1][-1] for reader in range(2)]
    report = stream.filters_report(last)
    assert [one["seen"] for one in report] == [12, 8]
    assert [one["removed"] for one in report] == [4, 0]


def test_a_stream_without_anything_left_is_an_error_that_says_so(folder):
    stream = build_examples(recipe(folder, [{"type": "resolution", "min_side": 99}], True), 0)
    (folder / "08.png").unlink()
    with pytest.raises(ValueError, match="no usable example"):
        texts_and_positions(stream, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_records_what_its_filters_removed_and_the_command_says_it(folder, tmp_path, streaming):
    tokenizer = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [16, 16],
        "latent_channels": 8,
        "num_vq_embeddings": 32,
        "vq_embed_dim": 8,
        "norm_num_groups": 4,
    }
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "reconstruction",
                "train": ["vision_tokenizer"],
                "model": {"vision_tokenizer": tokenizer, "image_size": 16},
                "data": {"source": str(folder), "filters": [RESOLUTION], "streaming": streaming},
                "training": {
                    "max_steps": 1,
                    "per_device_train_batch_size": 2,
                    "dataloader_num_workers": 2 if streaming else 0,
                    "perceptual_weight": 0,
                    "adversarial_weight": 0,
                    "use_cpu": True,
                    "report_to": "none",
                },
            }
        )
    )
    command = ["train", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (filtered,) = json.loads((tmp_path / "out" / "training.json").read_text())["data_filters"]
    assert {name: filtered[name] for name in RESOLUTION} == RESOLUTION
    # Of a stream's two readers, one has given the batch.
    assert (filtered["seen"], filtered["removed"]) == ((6, 2) if streaming else (12, 4))
    assert f"Filters: resolution removed {filtered['removed']} of {filtered['seen']}." in result.output
