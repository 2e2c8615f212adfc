"""Where examples come from: files of every form, columns of every name, images by file name and in tars."""

import io
import itertools
import json
import tarfile

import datasets
import pytest
from PIL import Image

from ett.data_ett import MixedExamples, SceneExamples
from ett.data_ett.mixture import shares
from ett.data_ett.rows import open_rows
from ett.data_ett.skipped import MissingDataError
from ett.processing_ett import ETTImageProcessor
from ett.train import FolderExamples, PreparedDataset, load_recipe, run_recipe
from ett.train.examples import build_examples

from .trainers import make_trainer


def png(red):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(content, format="PNG")
    return content.getvalue()


def red(image):
    return image.getpixel((0, 0))[0]


@pytest.fixture
def images(tmp_path):
    """A folder of five images, `0.png` to `4.png`, with their numbers for their reds."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def test_a_folder_may_have_the_name_of_a_format(images, monkeypatch):
    images.rename(images.with_name("parquet"))
    monkeypatch.chdir(images.parent)
    assert [red(FolderExamples("parquet", "reconstruction")[index]["images"][0]) for index in range(5)] == [
        0,
        1,
        2,
        3,
        4,
    ]


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def llava(value, answer="Red.", **more):
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}], **more}


# JSON


def test_llavas_json_names_its_images_and_mixes_rows_of_none_one_and_several(images):
    rows = [
        llava("<image>\nWhat?", image="0.png"),
        llava("<image><image>\nWhich?", image=["1.png", "2.png"]),
        llava("Hello."),
    ]
    (images / "llava.json").write_text(json.dumps(rows))
    examples = FolderExamples(str(images / "llava.json"), "chat")
    read = [examples[index] for index in range(3)]
    assert [[red(image) for image in example["images"]] for example in read] == [[0], [1, 2], []]
    assert [example["name"] for example in read] == ["0.png", "1.png", "row 2"]
    assert read[0]["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_messages_with_a_list_of_images_are_read_too(images):
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]
    path = write_lines(images / "chat.jsonl", [{"images": ["3.png"], "messages": messages}])
    assert [red(image) for image in FolderExamples(path, "chat")[0]["images"]] == [3]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_images_may_be_relative_to_another_folder(images, tmp_path, streaming):
    path = write_lines(tmp_path / "captions.jsonl", [{"image": "4.png", "text": "red"}])
    overrides = [f"data.source={path}", f"data.image_folder={images}", f"data.streaming={streaming}"]
    recipe = load_recipe("stage2_semantic", [*overrides, "training.max_steps=1"])
    examples = build_examples(recipe, 0)
    example = next(examples.read(0, 1))[0] if streaming else examples[0]
    assert [red(image) for image in example["images"]] == [4]


def test_an_image_folder_that_is_none_is_an_error(images):
    with pytest.raises(ValueError, match=r"data\.image_folder is 'absent', which is no folder"):
        open_rows(str(images), "reconstruction", image_folder="absent")


def test_a_missing_image_is_skipped_and_named(images):
    path = write_lines(images / "a.jsonl", [{"image": name, "text": "red"} for name in ("absent.png", "1.png")])
    examples = FolderExamples(path, "caption")
    assert red(examples[0]["images"][0]) == 1
    assert list(examples.skipped) == ["absent.png"] and "is missing" in examples.skipped["absent.png"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_that_was_listed_and_is_gone_is_an_error(images, streaming):
    overrides = [f"data.source={images}", f"data.streaming={streaming}", "training.max_steps=1"]
    examples = build_examples(load_recipe("tokenizer", overrides), 0)
    (images / "1.png").unlink()
    with pytest.raises(MissingDataError, match=r"1\.png' was there when training began and is missing now; put it"):
        list(itertools.islice(examples.read(0, 1), 5)) if streaming else examples[1]


def test_an_image_that_only_a_table_of_metadata_names_is_skipped(images):
    write_lines(images / "metadata.jsonl", [{"file_name": f"{number}.png", "text": "red"} for number in (9, 1)])
    examples = FolderExamples(str(images), "caption")
    assert red(examples[0]["images"][0]) == 1
    assert list(examples.skipped) == [str(images / "9.png")]


def test_a_folder_of_images_that_is_gone_is_an_error(images, tmp_path):
    path = write_lines(tmp_path / "captions.jsonl", [{"image": "4.png", "text": "red"}])
    examples = FolderExamples(path, "caption", image_folder=str(images))
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(MissingDataError, match=r"images' was there when training began"):
        examples[0]


def test_conversations_that_do_not_fit_are_skipped_unless_all_of_the_first_are_such(images):
    good, bad = llava("<image>\nWhat?", image="0.png"), llava("What?", image="1.png")
    with pytest.raises(ValueError, match=r"1\.png: The conversation has 0 placeholders <image> and the row has 1"):
        FolderExamples(write_lines(images / "all.jsonl", [bad, bad]), "chat")
    for number in (1, 100):
        examples = FolderExamples(write_lines(images / f"{number}.jsonl", [good] * number + [bad]), "chat")
        assert examples[number]["name"] == "0.png"
        assert list(examples.skipped) == ["1.png"]


def test_of_several_captions_one_is_drawn_the_same_in_every_epoch(images):
    rows = [{"image": f"{number}.png", "text": ["a", "b", "c"]} for number in range(5)] * 4
    path = write_lines(images / "captions.jsonl", rows)
    drawn = [FolderExamples(path, "caption", seed=seed)[index]["text"] for seed in range(6) for index in range(5)]
    assert set(drawn) == {"a", "b", "c"}
    again = FolderExamples(path, "caption", seed=2)
    assert [again[index]["text"] for index in range(5)] == drawn[10:15]
    (stream, reader) = open_rows(path, "caption", seed=2, streaming=True)
    assert [reader(row, reader.name(row, 0))["text"] for row in stream.take(5)] == drawn[10:15]


# Other files


def test_parquet_holds_its_images(tmp_path):
    rows = {"image": [{"bytes": png(9), "path": None}], "text": ["red"]}
    parquet = tmp_path / "one.parquet"
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False)).to_parquet(parquet)
    for path in (str(parquet), str(tmp_path), str(tmp_path / "*.parquet")):
        assert red(FolderExamples(path, "caption")[0]["images"][0]) == 9


def test_a_file_of_another_kind_is_an_error_that_names_those_there_are(tmp_path):
    (tmp_path / "notes.docx").write_text("mine")
    with pytest.raises(ValueError, match=r"is no file that is read as a dataset; expected one of \.json, \.jsonl"):
        FolderExamples(str(tmp_path / "notes.docx"), "caption")


# Webdatasets


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            information = tarfile.TarInfo(name)
            information.size = len(content)
            tar.addfile(information, io.BytesIO(content))
    return str(path)


def test_a_tars_image_may_have_any_suffix_and_its_text_stands_under_txt(tmp_path):
    members = {"a/1.PNG": png(1), "a/1.txt": b"one", "a/2.jpg": png(2), "a/2.txt": b"two", "a/2.json": b"{}"}
    examples = FolderExamples(write_tar(tmp_path / "a.tar", members), "caption")
    read = [examples[index] for index in range(2)]
    assert [(example["name"], example["text"], red(example["images"][0])) for example in read] == [
        ("a/1", "one", 1),
        ("a/2", "two", 2),
    ]


def test_fields_of_a_tars_json_are_columns(tmp_path):
    fields = {"title": "red", **llava("<image>\nWhat?")}
    path = write_tar(tmp_path / "a.tar", {"1.webp": png(1), "1.json": json.dumps(fields).encode()})
    assert FolderExamples(path, "caption", text_column="title")[0]["text"] == "red"
    assert FolderExamples(path, "chat")[0]["messages"][1] == {"role": "assistant", "content": "Red."}


def test_a_column_that_no_json_of_a_tar_has_is_an_error_that_names_those_there_are(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": png(1), "1.json": b'{"title": "red"}'})
    with pytest.raises(ValueError, match=r"1: The row has no 'text', but .*'title'.*Name yours with data"):
        FolderExamples(path, "caption")


def test_what_macos_adds_to_a_tar_and_to_texts_is_left_out(tmp_path):
    members = {
        "./._1.png": b"nothing",
        "./1.png": png(1),
        "__MACOSX/1.png": b"nothing",
        "2.png": png(2),
        ".DS_Store": b"nothing",
        "2.txt": b"\xef\xbb\xbftwo\r\nlines\r\n",
    }
    path = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "._a.tar").write_bytes(b"nothing")
    assert [
        red(example["images"][0]) for example in map(FolderExamples(path, "reconstruction").__getitem__, (0, 1))
    ] == [
        1,
        2,
    ]
    assert FolderExamples(str(tmp_path), "caption")[1]["text"] == "two\nlines"


def test_two_rows_of_one_key_in_a_tar_are_two_rows(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in (1, 2):
            for suffix, content in (("png", png(number)), ("txt", f"text {number}".encode())):
                member = tarfile.TarInfo(f"0001.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    examples = FolderExamples(str(tmp_path / "a.tar"), "caption")
    read = [examples[index] for index in range(len(examples))]
    assert [(example["text"], red(example["images"][0])) for example in read] == [("text 1", 1), ("text 2", 2)]


def test_brackets_in_the_name_of_a_folder_of_tars_are_no_pattern(tmp_path):
    (tmp_path / "br [1]").mkdir()
    write_tar(tmp_path / "br [1]" / "a.tar", {"1.png": png(1)})
    for name in ("br [1]", "br [1]/a.tar", "br [1]/*.tar"):
        assert len(FolderExamples(str(tmp_path / name), "reconstruction")) == 1


def test_a_cut_off_tar_is_read_as_far_as_it_goes_and_named(tmp_path):
    members = {f"{number}.{suffix}": content for number in range(3) for suffix, content in (("png", png(number)),)}
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as tar:
        cut = tar.getmember("2.png").offset_data + 10
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    examples = FolderExamples(path, "reconstruction")
    assert len(examples) == 2
    assert "cut off within '2.png'" in examples.skipped[path]


def test_a_corrupt_image_of_a_tar_is_skipped_and_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": b"nothing", "1.txt": b"one", "2.png": png(2), "2.txt": b"two"})
    examples = FolderExamples(path, "caption")
    assert examples[0]["text"] == "two" and list(examples.skipped) == ["1"]


# Mixtures


def test_a_mixture_has_exact_shares_and_shows_examples_equally_often():
    sources = {"a": SceneExamples("text", 0, "train", 30), "b": SceneExamples("text", 0, "train", 10)}
    mixed = MixedExamples(sources, {"a": 1, "b": 1})
    names = [mixed[index]["name"] for index in range(len(mixed))]
    counts = {name: names.count(name) for name in names}
    assert len(names) == 40
    assert sum(name.startswith("a: ") for name in names) == 20
    assert {count for name, count in counts.items() if name.startswith("b: ")} == {2}
    assert {count for name, count in counts.items() if name.startswith("a: ")} == {1}


def test_a_mixture_is_in_a_mixed_order_that_the_seed_decides():
    def order(seed):
        sources = {name: SceneExamples("text", 0, "train", 20) for name in "ab"}
        mixed = MixedExamples(sources, {"a": 1, "b": 2}, seed)
        return [mixed[index]["name"] for index in range(40)]

    assert order(0) == order(0) != order(1)
    assert order(0) != sorted(order(0))


def test_shares_are_whole_numbers_that_add_up():
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [0.2, 0.3]) == [3, 4]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_mixes_sources_each_with_columns_of_its_own(images, tmp_path, streaming):
    one = write_lines(images / "one.jsonl", [{"image": "1.png", "title": "red"}])
    two = write_lines(images / "two.jsonl", [{"photo": "2.png", "text": "blue"}])
    recipe = load_recipe(
        "stage2_semantic",
        [
            f"data.mixture={{one: {{source: '{one}', text_column: title}}, two: {{source: x, image_column: photo}}}}",
            f"data.mixture.two.source={two}",
            "data.mixture.two.weight=3",
            f"data.streaming={streaming}",
            "training.max_steps=1",
        ],
    )
    examples = build_examples(recipe, 0)
    read = zip(range(20), examples.read(0, 1), strict=False) if streaming else enumerate(examples)
    found = {(example["text"] if not streaming else example[0]["text"]) for _, example in read}
    assert found == {"red", "blue"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mixture={a: {sorce: x}}", "unknown field 'data.mixture.a.sorce'. Did you mean 'source'?"),
        ("data.mixture=[a]", "'data.mixture' is ['a']; it is a mapping of names to sections"),
        ("data.mixture={a: folder}", "it is a mapping of names to sections"),
    ],
)
def test_what_is_wrong_in_a_mixture_is_named(override, message):
    with pytest.raises(ValueError) as caught:
        load_recipe("stage2_semantic", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=a", "data.mixture={b: {source: c}}"], r"has data\.source \('a'\) and data\.mixture \(b\)"),
        (["data.mixture={b: {source: scenes, weight: 0}}"], r"data\.mixture\.b\.weight is 0; expected a number above"),
        (["data.mixture={b: {source: ./absent}}"], r"data\.mixture\.b: './absent' could not be read"),
        (["data.mixture={b: {weight: 1}}"], r"data\.mixture\.b: This recipe needs data"),
    ],
)
def test_a_mixture_that_cannot_be_used_is_refused_before_any_weight_is_loaded(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run_recipe("stage2_semantic", ["model.path=./no-model", *overrides], tmp_path / "out")


def test_what_workers_skip_is_known_to_the_trainer(tmp_path, make_vision_tokenizer, arguments):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number) if number else b"nothing")
    examples = FolderExamples(str(tmp_path), "reconstruction")
    image_processor = ETTImageProcessor(size={"height": 16, "width": 16})
    args = arguments(dataloader_num_workers=2, adversarial_weight=0.0)
    trainer = make_trainer(make_vision_tokenizer(), args, PreparedDataset(examples, "reconstruction", image_processor))
    trainer.train()
    assert examples.skipped == {}
    assert [name.rsplit("/")[-1] for name in trainer.skipped()] == ["0.png"]
