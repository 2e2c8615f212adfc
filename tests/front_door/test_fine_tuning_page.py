"""The scripts of docs/fine-tuning.md, run as they stand on a tiny model and four images."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from ett.train.models.adapters import merge_folder

PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
SECTIONS = re.split(r"^##+ (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
SCRIPTS = {
    title: "".join(re.findall(r"^```python\n(.+?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    for title, text in zip(SECTIONS[::2], SECTIONS[1::2], strict=True)
}


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """The working directory, with `ett-chat`, `ett-gen` and `photos`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("ett-chat", "ett-gen"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "photos").mkdir()
    captions = ["a red circle", "a blue square", "the color is red", "blue"]
    for index in range(len(captions)):
        Image.linear_gradient("L").rotate(90 * index).save(tmp_path / "photos" / f"{index}.png")
    rows = [json.dumps({"file_name": f"{index}.png", "text": text}) for index, text in enumerate(captions)]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def run(title: str, **names) -> dict:
    """The names that a section's script leaves."""
    exec(compile(SCRIPTS[title], f"{PAGE.name}, {title}", "exec"), names)
    return names


def changed_parts(before: Path, after: Path) -> set[str]:
    """Parts of two model folders with other weights."""
    old, new = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (before, after))
    assert old.keys() == new.keys()
    return {name.removeprefix("model.").split(".")[0] for name in old if not torch.equal(old[name], new[name])}


def test_the_script_for_trainer_trains_all_but_the_tokenizer_on_the_captions(folder):
    names = run("Trainer")
    # The embeddings of the words are also the head for text.
    assert changed_parts("ett-chat", "ett-photos") - {"lm_head"} == {"projector", "language_model"}
    assert pipeline("image-to-text", model="ett-photos")("photos/0.png", max_new_tokens=2)

    rows = list(names["trainer"].train_dataset)
    batch, tokenizer = names["collate"](rows), names["processor"].tokenizer
    for row, labels in zip(rows, batch["labels"], strict=True):
        ids = labels[labels != -100]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == row["text"]
        assert ids[-1] == tokenizer.eos_token_id


def test_the_collator_for_image_generation_gives_the_loss_of_the_codes(folder):
    model = AutoModelForImageTextToText.from_pretrained("ett-gen")
    photos = datasets.load_dataset("imagefolder", data_dir="photos", split="train")
    processor = AutoProcessor.from_pretrained("ett-gen")
    batch = run("Image generation", processor=processor)["collate"](list(photos))
    outputs = model(**batch, skip_logits=False)
    codes = model.model.quantize_pixels(batch["pixel_values"]).codes
    torch.testing.assert_close(
        outputs.loss, torch.nn.functional.cross_entropy(outputs.code_logits, codes.flatten()), rtol=1e-4, atol=1e-5
    )


def test_the_script_for_peft_trains_adapters_and_projector_and_its_folder_merges(folder):
    run("peft")
    parts = {
        re.match(r"base_model\.model\.model\.(\w+)", name)[1]
        for name in load_file("ett-photos-adapter/adapter_model.safetensors")
    }
    assert parts == {"projector", "language_model"}
    assert AutoProcessor.from_pretrained("ett-photos-adapter").image_token_id
    merge_folder("ett-chat", "ett-photos-adapter", "ett-photos")
    assert changed_parts("ett-chat", "ett-photos") == {"projector", "language_model"}


def test_the_script_for_sft_trainer_trains_all_but_the_tokenizer(folder):
    pytest.importorskip("trl")
    names = run("SFTTrainer")
    assert changed_parts("ett-chat", "ett-photos-trl") - {"lm_head"} == {"projector", "language_model"}
    assert AutoProcessor.from_pretrained("ett-photos-trl").image_token_id
    trainer = names["trainer"]
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    texts = [
        names["processor"].tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in batch["labels"]
    ]
    assert [text.strip() for text in texts] == ["a red circle", "a blue square", "the color is red", "blue"]


def test_one_line_freezes_the_tokenizer_that_is_trained_without(folder):
    model = AutoModelForImageTextToText.from_pretrained("ett-chat")
    tokenizer = model.model.vision_tokenizer
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())
    run("What to freeze", model=model)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert model.model.projector.linear_1.weight.requires_grad
