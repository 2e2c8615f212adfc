"""New captions for a dataset: by any model, resumable, and ready to be learned from."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)
from typer.testing import CliRunner

from ett.cli import app
from ett.data_ett import recaption as module
from ett.data_ett.recaption import Captioner, Recaptioning, recaption
from ett.data_ett.shards import Part, Skipped
from ett.processing_ett import ETTProcessor, build_word_tokenizer
from ett.train import FolderExamples

WORDS = "describe the image . a red blue circle square is what color ?".split()


@pytest.fixture
def ett_model(make_model, make_language_model, make_vision_tokenizer, tmp_path):
    """Folder of a tiny ETT model that answers with words."""
    processor = ETTProcessor.from_parts(build_word_tokenizer(WORDS), 4, image_size=16)
    language_model = make_language_model(vocab_size=len(processor.tokenizer))
    model = make_model(
        language_model,
        make_vision_tokenizer(),
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
    )
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    model.save_pretrained(tmp_path / "ett")
    processor.save_pretrained(tmp_path / "ett")
    return str(tmp_path / "ett")


@pytest.fixture
def llava_model(tmp_path):
    """Folder of a tiny Llava, as an image-text-to-text model that is not ours."""
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.5, bos_token_id=None, **sizes
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    return str(tmp_path / "llava")


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


@pytest.fixture
def source(tmp_path):
    """Five images with captions and a number, of which the third is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number in range(5):
        image(number).save(folder / f"{number}.png")
        lines.append(f'{{"file_name": "{number}.png", "text": "old {number}", "number": {number}}}')
    (folder / "2.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def written(folder):
    return datasets.load_dataset(str(folder), split="train")


def alone(model, images, **options):
    """What the model says of each image, with nothing else in the batch."""
    captioner = Captioner(model, device="cpu", **{"max_new_tokens": 5, **options})
    return [captioner.describe([[image]])[0] for image in images]


@pytest.fixture(params=["ett_model", "llava_model"])
def model(request):
    return request.getfixturevalue(request.param)


def test_a_data_set_is_written_with_new_captions_and_all_else_it_holds(model, source, tmp_path):
    report = recaption(source, tmp_path / "out", model, max_new_tokens=5, batch_size=2, device="cpu", progress=False)
    rows = written(tmp_path / "out")
    numbers = [0, 1, 3, 4]
    assert rows["number"][:] == numbers
    assert rows["original_text"][:] == [f"old {number}" for number in numbers]
    assert rows["text"][:] == alone(model, [image(number) for number in numbers])
    assert len(set(rows["text"][:])) > 1
    assert [np.asarray(shown).tolist() for shown in rows["image"]] == [
        np.asarray(image(number)).tolist() for number in numbers
    ]
    assert [entry["row"] for entry in report.skipped] == [2]
    assert report.skipped[0]["name"].endswith("2.png") and "not an image" in report.skipped[0]["reason"]


def test_the_output_is_a_source_of_data(ett_model, source, tmp_path):
    recaption(source, tmp_path / "out", ett_model, max_new_tokens=5, device="cpu", progress=False)
    examples = FolderExamples(str(tmp_path / "out"), "caption")
    assert len(examples) == 4
    assert examples[0]["text"] == alone(ett_model, [image(0)])[0]
    assert np.array_equal(np.asarray(examples[0]["images"][0]), np.asarray(image(0)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interrupted_and_divided_work_ends_as_work_in_one_go(ett_model, source, tmp_path, monkeypatch, temperature):
    options = {"max_new_tokens": 5, "batch_size": 2, "rows_per_shard": 2, "temperature": temperature, "seed": 3}
    options |= {"device": "cpu", "progress": False}
    recaption(source, tmp_path / "whole", ett_model, **options)
    recaption(source, tmp_path / "parts", ett_model, part=Part(1, 2), **options)
    original = module.Captioner.describe
    calls = []

    def describe(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(module.Captioner, "describe", describe)
        with pytest.raises(KeyboardInterrupt):
            recaption(source, tmp_path / "parts", ett_model, **options)
    report = recaption(source, tmp_path / "parts", ett_model, **options)
    assert report.read == 1
    assert written(tmp_path / "parts")["text"][:] == written(tmp_path / "whole")["text"][:]


def test_captions_are_sampled_by_the_seed(ett_model, source, tmp_path):
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        options = {"temperature": 2.0, "seed": seed, "max_new_tokens": 8, "device": "cpu", "progress": False}
        recaption(source, tmp_path / str(number), ett_model, **options)
        texts.append(written(tmp_path / str(number))["text"][:])
    assert texts[0] == texts[1] != texts[2]


def test_images_that_are_files_named_by_the_data_come_into_the_output(ett_model, source, tmp_path):
    lines = [f'{{"image": "{number}.png", "text": "old"}}' for number in range(2)]
    (Path(source) / "rows.json").write_text("\n".join(lines))
    path = str(Path(source) / "rows.json")
    recaption(path, tmp_path / "out", ett_model, max_new_tokens=5, device="cpu", progress=False)
    for number, shown in enumerate(written(tmp_path / "out")["image"]):
        assert np.array_equal(np.asarray(shown), np.asarray(image(number)))


def test_images_by_url_come_into_the_output(ett_model, source, tmp_path, monkeypatch):
    content = (Path(source) / "1.png").read_bytes()
    monkeypatch.setattr("ett.processing_ett.image_reading_ett._fetch", lambda url: content)
    (Path(source) / "rows.json").write_text('{"image": "https://example.com/1.png"}')
    path = str(Path(source) / "rows.json")
    recaption(path, tmp_path / "out", ett_model, max_new_tokens=5, device="cpu", progress=False)
    assert np.array_equal(np.asarray(written(tmp_path / "out")["image"][0]), np.asarray(image(1)))


def test_images_without_captions_get_them(ett_model, tmp_path):
    (tmp_path / "bare").mkdir()
    image(0).save(tmp_path / "bare" / "0.png")
    recaption(str(tmp_path / "bare"), tmp_path / "out", ett_model, max_new_tokens=5, device="cpu", progress=False)
    assert set(written(tmp_path / "out").column_names) == {"image", "text"}


def test_a_rows_images_are_described_together_and_a_row_without_one_is_left_out(ett_model):
    features = datasets.Features({"image": datasets.List(datasets.Image(decode=False))})
    decoded = datasets.Features({"image": datasets.List(datasets.Image())})
    rows = datasets.Dataset.from_dict({"image": [[image(0), image(1)], []]}, features=decoded).cast(features)
    captioner = Captioner(ett_model, max_new_tokens=5, device="cpu")
    work = Recaptioning(rows, captioner)
    described, left_out = work.make_rows(range(2))
    assert described["text"] == captioner.describe([[image(0), image(1)]])[0]
    assert left_out == Skipped("row 1", "It has no image.")
    assert work.features == {**decoded, "text": datasets.Value("string")}


def test_a_data_set_is_not_described_twice(ett_model, source, tmp_path):
    recaption(source, tmp_path / "out", ett_model, max_new_tokens=5, device="cpu", progress=False)
    with pytest.raises(ValueError, match="has a column 'original_text', so its captions are new already"):
        recaption(str(tmp_path / "out"), tmp_path / "again", ett_model)


def test_a_model_that_follows_no_chat_is_an_error(llava_model):
    processor = AutoProcessor.from_pretrained(llava_model)
    processor.chat_template = None
    processor.save_pretrained(llava_model)
    (Path(llava_model) / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"cannot describe images: its processor has no chat template; choose"):
        Captioner(llava_model)


def test_a_missing_model_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'nobody/nothing' cannot describe images"):
        Captioner("nobody/nothing")


def test_the_command_writes_a_data_set_and_says_how_fast(ett_model, source, tmp_path):
    options = ["--model", ett_model, "--max-new-tokens", "5", "--device", "cpu", "--shard", "0/1"]
    result = CliRunner().invoke(app, ["recaption", source, str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert f"Wrote {tmp_path / 'out'}: 4 rows, 1 skipped." in result.output
    assert "images/s" in result.output
    assert len(written(tmp_path / "out")) == 4
