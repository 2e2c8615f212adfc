"""Streams: every row once an epoch whoever reads, and going on to the last bit wherever one stopped."""

import io
import itertools
import json
import logging
import tarfile

import datasets
import pytest
from PIL import Image

from ett.data_ett import ExampleStream, MixedStream, PreparedStream
from ett.data_ett.rows import open_rows
from ett.data_ett.skipped import MissingDataError
from ett.data_ett.stream import DatasetShards, TarShards
from ett.train import ETTCollator, PreparedDataset
from ett.train.examples import build_examples
from ett.train.recipes import load_recipe
from ett.train.stream_loader import StreamLoader

from .trainers import changed, make_trainer

WORDS = ("red", "blue", "circle", "square")


def png(red):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(content, format="PNG")
    return content.getvalue()


def write_parquet(folder, sizes):
    """Shards of so many rows; each row's image has its number for its red, and for its name."""
    number = itertools.count()
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        numbers = list(itertools.islice(number, size))
        rows = {
            "image": [{"bytes": png(index), "path": f"{index}.png"} for index in numbers],
            "text": [WORDS[index % len(WORDS)] for index in numbers],
        }
        shards = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
        shards.to_parquet(folder / f"{shard:03}.parquet")
    return folder


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            information = tarfile.TarInfo(name)
            information.size = len(content)
            tar.addfile(information, io.BytesIO(content))
    return path


@pytest.fixture
def make_stream(tmp_path):
    """Makes a stream of captions of Parquet shards of the given sizes."""

    def make(sizes, seed=0, block_rows=3):
        folder = write_parquet(tmp_path / f"parquet{'-'.join(map(str, sizes))}", sizes)
        rows, reader = open_rows(str(folder), "caption", streaming=True)
        return ExampleStream(DatasetShards(rows, str(folder)), reader, seed, block_rows)

    return make


def names(stream, reader, readers, count, position=None):
    return [example["name"] for example, _ in itertools.islice(stream.read(reader, readers, position), count)]


def epochs(stream, reader, readers):
    """Names of the first and the second epoch of one reader."""
    parts = [[], []]
    for example, position in stream.read(reader, readers):
        if position["epoch"] == 2:
            return parts
        parts[position["epoch"]].append(example["name"])


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (7, 2, 5, 1, 6, 3), (9, 12), (21,)], ids=str)
def test_every_epoch_four_readers_read_every_row_once(make_stream, sizes):
    """Also where shards do not divide among them."""
    stream = make_stream(sizes)
    expected = sorted(f"{number}.png" for number in range(sum(sizes)))
    first, second = zip(*(epochs(stream, reader, 4) for reader in range(4)), strict=True)
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == expected
    assert first != second


def test_shards_that_divide_among_readers_are_opened_by_one_each(make_stream, monkeypatch):
    stream, opened = make_stream((5, 5, 5, 5)), []
    read = DatasetShards.read
    monkeypatch.setattr(DatasetShards, "read", lambda self, shard, start: opened.append(shard) or read(self, shard, 0))
    for reader in range(2):
        assert len(names(stream, reader, 2, 10)) == 10
    assert sorted(opened) == [0, 1, 2, 3]


def test_examples_are_mixed_by_the_seed_alone(make_stream):
    order = names(make_stream((10, 10)), 0, 1, 20)
    assert order == names(make_stream((10, 10)), 0, 1, 20)
    assert order != names(make_stream((10, 10), seed=1), 0, 1, 20)
    assert order != sorted(order)


@pytest.mark.parametrize("sizes", [(4, 5, 4), (13,)], ids=str)
def test_a_reader_goes_on_from_any_position_as_if_it_had_never_stopped(make_stream, sizes):
    """Across blocks, shards and epochs; a position survives JSON."""
    stream = make_stream(sizes)
    read = list(itertools.islice(stream.read(1, 2), 16))
    for done in (0, 2, 3, 6, 8, 14):
        position = json.loads(json.dumps(read[done][1]))
        expected = [example["name"] for example, _ in read[done + 1 :]]
        assert names(make_stream(sizes), 1, 2, 15 - done, position) == expected


def test_of_an_image_that_cannot_be_read_the_name_and_reason_are_told_once(tmp_path):
    folder = write_parquet(tmp_path / "data", (4,))
    rows = {"image": [{"bytes": b"nothing", "path": "broken.png"}], "text": ["red"]}
    broken = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    broken.to_parquet(folder / "001.parquet")
    rows, reader = open_rows(str(folder), "caption", streaming=True)
    stream = ExampleStream(DatasetShards(rows, "data"), reader, 0)
    assert "broken.png" not in names(stream, 0, 1, 12)
    skipped = stream.take_skipped()
    assert list(skipped) == ["broken.png"] and "not an image" in skipped["broken.png"]
    assert stream.take_skipped() == {}


def test_a_broken_shard_is_left_and_named_and_the_others_are_read(tmp_path, caplog):
    folder = write_parquet(tmp_path / "data", (3, 3, 3))
    rows, reader = open_rows(str(folder), "caption", streaming=True)
    whole = (folder / "002.parquet").read_bytes()
    (folder / "002.parquet").write_bytes(whole[:-200])
    stream = ExampleStream(DatasetShards(rows, "data"), reader, 0)
    with caplog.at_level(logging.WARNING, logger="ett.data_ett.skipped"):
        assert set(names(stream, 0, 1, 12)) == {f"{number}.png" for number in range(6)}
    assert list(stream.take_skipped()) == ["shard 2 of data"]
    assert "Only its beginning can be read" in caplog.text


def test_a_reader_without_any_usable_row_is_an_error(make_stream):
    stream = make_stream((1, 1))
    with pytest.raises(ValueError, match=r"Reader 2 of 3 has no usable example in a whole epoch of 2 shards"):
        names(stream, 1, 3, 1)


# Tar files


def members(number, text="red", **more):
    return [(f"{number}.png", png(number)), (f"{number}.txt", text.encode()), *more.items()]


def test_a_cut_off_tar_gives_the_rows_before_the_cut(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*members(0), *members(1), *members(2)])
    with tarfile.open(path) as tar:
        cut = tar.getmember("2.png").offset_data + 10
    path.write_bytes(path.read_bytes()[:cut])
    tars, reader = open_rows(str(path), "caption", streaming=True)
    stream = ExampleStream(TarShards(tars), reader, 0)
    assert sorted(names(stream, 0, 1, 2)) == ["0", "1"]
    next(stream.read(0, 1, {"epoch": 1, "shard": 0, "row": 0, "block": 0, "offset": 0}))
    skipped = stream.take_skipped()
    assert list(skipped) == [str(path)] and "cut off within '2.png'" in skipped[str(path)]


def test_a_tar_that_was_listed_and_is_gone_is_an_error(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members(shard))
    tars, reader = open_rows(str(tmp_path), "caption", streaming=True)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(MissingDataError, match=r"1\.tar' was there when training began"):
        names(ExampleStream(TarShards(tars), reader, 0), 0, 1, 2)


def test_tars_are_streamed_by_several_readers_and_gone_on_with(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [part for index in range(4) for part in members(4 * shard + index)])
    tars, reader = open_rows(str(tmp_path / "*.tar"), "caption", streaming=True)
    make = lambda: ExampleStream(TarShards(tars), reader, 0, block_rows=3)  # noqa: E731
    firsts = [epochs(make(), number, 2)[0] for number in range(2)]
    assert sorted(itertools.chain(*firsts), key=int) == [str(number) for number in range(12)]
    read = list(itertools.islice(make().read(0, 2), 9))
    assert names(make(), 0, 2, 4, read[4][1]) == [example["name"] for example, _ in read[5:]]


# Mixtures


def test_a_mixed_stream_draws_by_weight_and_goes_on_to_the_last_draw(make_stream):
    def make():
        return MixedStream({"a": make_stream((10,)), "b": make_stream((7,))}, {"a": 3, "b": 1})

    read = list(itertools.islice(make().read(0, 1), 400))
    share = sum(example["name"].startswith("a: ") for example, _ in read) / 400
    assert 0.68 < share < 0.82
    assert names(make(), 0, 1, 300, json.loads(json.dumps(read[99][1]))) == [
        example["name"] for example, _ in read[100:]
    ]


# Loaders


@pytest.fixture
def make_loader(make_stream, processor):
    """Makes a loader of batches of two, each the images' reds."""

    def make(workers=0, rank=0, world_size=1, sizes=(5, 5, 5, 5), max_length=4096):
        prepared = PreparedDataset(make_stream(sizes), "caption", processor, max_length=max_length)
        stream = PreparedStream(prepared.examples, prepared)
        reds = lambda items: {"reds": [int(item["pixel_values"][0, 0, 0, 0]) for item in items]}  # noqa: E731
        return StreamLoader(stream, reds, 2, workers, rank, world_size)

    return make


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (8, 8)], ids=str)
def test_two_processes_of_two_workers_read_every_row_once(make_loader, sizes):
    reds = [
        [red for batch in itertools.islice(make_loader(2, rank, 2, sizes), 4) for red in batch["reds"]]
        for rank in range(2)
    ]
    assert sorted(reds[0] + reds[1]) == list(range(16))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [3, 4])
def test_a_loader_goes_on_with_the_batch_that_would_have_come(make_loader, tmp_path, workers, done):
    whole = list(itertools.islice(make_loader(workers), 12))
    loader = make_loader(workers)
    assert list(itertools.islice(loader, done)) == whole[:done]
    loader.save(tmp_path)
    resumed = make_loader(workers)
    resumed.load(tmp_path)
    assert list(itertools.islice(resumed, 12 - done)) == whole[done:]


def test_a_checkpoint_of_other_workers_or_processes_is_refused(make_loader, tmp_path):
    make_loader(workers=2).save(tmp_path)
    with pytest.raises(ValueError, match=r"written by 1 processes with 2 readers each.*dataloader_num_workers=2"):
        make_loader(workers=0).load(tmp_path)
    with pytest.raises(ValueError, match=r"stream-1\.json.* is missing or damaged"):
        make_loader(workers=2, rank=1, world_size=2).load(tmp_path)


def test_examples_that_are_too_long_are_skipped_but_not_for_ever(make_loader):
    loader = make_loader(max_length=70)
    with pytest.raises(ValueError, match=r"examples in a row cannot be used.*more than data.max_length=70"):
        next(iter(loader))


def test_what_was_skipped_before_a_checkpoint_is_not_forgotten(tmp_path, processor):
    for index in range(4):
        write_tar(tmp_path / f"{index}.tar", members(index, **({"2.json": b"{"} if index == 2 else {})))
    rows, reader = open_rows(str(tmp_path), "caption", streaming=True)
    make = lambda: ExampleStream(TarShards(rows), reader, 0)  # noqa: E731
    loader = StreamLoader(PreparedStream(make(), PreparedDataset(None, "caption", processor)), ETTCollator(), 3)
    next(iter(loader))
    loader.save(tmp_path)
    resumed = StreamLoader(PreparedStream(make(), PreparedDataset(None, "caption", processor)), ETTCollator(), 3)
    resumed.load(tmp_path)
    assert list(resumed.skipped) == ["2"] and "Its json cannot be read" in resumed.skipped["2"]


# In the trainer's hands


class Numbered:
    """Stands for what makes numbers of examples: the items that the tests of training have."""

    def __init__(self, items):
        self.items = items

    def prepare(self, example, number):
        return dict(self.items[int(example["name"].removesuffix(".png"))])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_on_a_stream_is_the_uninterrupted_one_to_the_last_bit(
    make_vision_tokenizer, make_stream, arguments, make_items, tmp_path, workers
):
    """With accumulation, and a number of examples that no batch divides."""

    def make(output_dir):
        args = arguments(
            output_dir=str(output_dir),
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            gradient_accumulation_steps=3,
            adversarial_weight=0.0,
            per_device_train_batch_size=1,
            dataloader_num_workers=workers,
        )
        stream = PreparedStream(make_stream((4, 3)), Numbered(make_items(7)))
        return make_trainer(make_vision_tokenizer(), args, stream)

    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert changed(whole.model.state_dict(), resumed.model) == set()
    assert [entry.get("loss") for entry in resumed.state.log_history] == [
        entry.get("loss") for entry in whole.state.log_history
    ]
    assert [entry["epoch"] for entry in resumed.state.log_history if "loss" in entry] == [0.25, 0.5, 0.75, 1.0]


def test_a_run_on_a_stream_that_resumes_at_its_last_step_ends(
    make_vision_tokenizer, make_stream, arguments, make_items, tmp_path
):
    args = arguments(max_steps=1, save_strategy="steps", save_steps=1)
    stream = PreparedStream(make_stream((4,)), Numbered(make_items(4)))
    whole, resumed = (make_trainer(make_vision_tokenizer(), args, stream) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.state.global_step == 1 and changed(whole.model.state_dict(), resumed.model) == set()


def test_a_run_on_a_stream_is_not_resumed_with_other_workers(
    make_vision_tokenizer, make_stream, arguments, make_items, tmp_path
):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    stream = PreparedStream(make_stream((4,)), Numbered(make_items(4)))
    make_trainer(make_vision_tokenizer(), arguments(**options), stream).train()
    trainer = make_trainer(make_vision_tokenizer(), arguments(**options, dataloader_num_workers=2), stream)
    with pytest.raises(ValueError, match=r"go on with 1 processes and training\.dataloader_num_workers=1"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


# Recipes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"say how long to train: training\.max_steps"),
        (["training.max_steps=2", "data.in_memory=true"], r"set data\.in_memory=false"),
        (
            ["training.max_steps=2", "model.codebook_size=8"],
            r"model\.codebook_size counts codes .* data\.streaming=false",
        ),
    ],
)
def test_what_a_stream_cannot_give_is_refused_before_anything_is_read(overrides, message):
    recipe = load_recipe("stage2_semantic", ["data.streaming=true", "data.source=absent", *overrides])
    recipe.training.setdefault("max_steps", -1)
    with pytest.raises(ValueError, match=message):
        build_examples(recipe, 0)
