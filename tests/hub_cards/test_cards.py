import ast
import re

import pytest
from huggingface_hub import ModelCard

from ett.hub_cards import write_card


@pytest.fixture
def record():
    return {
        "kind": "chat",
        "recipe": {"stage2": {"learning_rate": 4e-5, "trains": ["tokenizer", "projector"]}},
        "seed": 7,
        "steps": 1200,
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
        "seconds": 3725.4,
        "data": "scenes, drawn on the fly",
        "results": [
            {
                "task": "Question answering",
                "dataset": "scenes",
                "split": "test",
                "metric": "accuracy",
                "value": 0.8125,
            },
            {"task": "Question answering", "dataset": "scenes", "split": "test", "metric": "colour", "value": 0.9},
            {"task": "Reconstruction", "dataset": "scenes", "split": "test", "metric": "PSNR", "value": 23.4567},
        ],
    }


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "ett-chat"
    folder.mkdir()
    return folder


def test_card_metadata_is_what_the_hub_reads(folder, record):
    data = ModelCard.load(write_card(folder, record)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    assert "ett" in data.tags and "arxiv:2505.10562" in data.tags
    assert data.base_model is None


def test_results_are_metadata_with_their_exact_values(folder, record):
    data = ModelCard.load(write_card(folder, record)).data
    assert data.model_name == "ett-chat"
    found = {(r.task_type, r.dataset_name, r.dataset_split, r.metric_name, r.metric_value) for r in data.eval_results}
    assert found == {
        ("question-answering", "scenes", "test", "accuracy", 0.8125),
        ("question-answering", "scenes", "test", "colour", 0.9),
        ("reconstruction", "scenes", "test", "PSNR", 23.4567),
    }


def test_body_says_what_was_recorded(folder, record):
    text = write_card(folder, record).read_text()
    assert text.count("---\n") == 2
    for part in (
        "# ett-chat: ETT-Chat",
        "| data | scenes, drawn on the fly |",
        "| steps | 1200 |",
        "| seed | 7 |",
        "| time | 1 h 2 min 5 s |",
        "stage2:\n  learning_rate: 4.0e-05\n  trains:\n  - tokenizer\n  - projector",
        "| Reconstruction | scenes | test | PSNR | 23.46 |",
        "torch 2.15.0, transformers 5.23.0",
        'pipeline("image-to-text", model="ett-chat")',
        "arXiv:2505.10562",
    ):
        assert part in text, part
    assert "LPIPS" not in text and "| loss |" not in text and "| weights |" not in text


def test_body_says_where_the_weights_are_an_average(folder, record):
    text = write_card(folder, {**record, "weights": "ema"}).read_text()
    assert "| weights | the moving average (EMA) of those trained |" in text
    assert "| weights |" not in write_card(folder, {**record, "weights": "raw"}).read_text()


@pytest.mark.parametrize(
    ("kind", "library", "part"),
    [
        ("tokenizer", "diffusers", 'IBQModel.from_pretrained("ett-chat")'),
        ("gen", "transformers", 'generation_mode="image"'),
    ],
)
def test_each_kind_says_how_it_is_used(folder, record, kind, library, part):
    card = ModelCard.load(write_card(folder, record | {"kind": kind}))
    assert card.data.library_name == library
    assert part in card.text


def test_python_in_the_card_is_python(folder, record):
    for kind in ("tokenizer", "chat", "gen"):
        text = write_card(folder, record | {"kind": kind}).read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert ast.parse(code).body


def test_random_lpips_backbone_is_said_under_training_and_limits(folder, record):
    text = write_card(folder, record | {"lpips_backbone": "random"}).read_text()
    training, limits = text.split("## Limits")
    assert "**randomly initialised** backbone" in training
    assert "randomly initialised backbone" in limits


def test_pretrained_lpips_backbone_is_said(folder, record):
    text = write_card(folder, record | {"lpips_backbone": "pretrained"}).read_text()
    assert "LPIPS on its pretrained backbone" in text and "random" not in text


def test_losses_and_notes_are_listed(folder, record):
    text = write_card(folder, record | {"losses": {"caption": 0.51234}, "notes": ["Quick run."]}).read_text()
    assert "| caption | 0.5123 |" in text
    assert "\n- Quick run.\n" in text


def test_a_data_set_of_the_hub_is_metadata(folder, record):
    assert ModelCard.load(write_card(folder, record | {"data": "owner/photos"})).data.datasets == ["owner/photos"]
    assert ModelCard.load(write_card(folder, record)).data.datasets is None


def test_a_local_folder_is_no_data_set_of_the_hub(folder, record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "photos").mkdir(parents=True)
    assert ModelCard.load(write_card(folder, record | {"data": "my/photos"})).data.datasets is None


def test_text_cannot_break_a_table(folder, record):
    assert "| data | a \\| b c |" in write_card(folder, record | {"data": "a | b\nc"}).read_text()


def test_no_results_is_said(folder, record):
    card = ModelCard.load(write_card(folder, record | {"results": []}))
    assert card.data.eval_results is None
    assert "None were recorded." in card.text


def test_incomplete_record_names_what_is_missing_and_keeps_the_old_card(folder, record):
    write_card(folder, record)
    before = (folder / "README.md").read_text()
    del record["seed"], record["data"]
    with pytest.raises(ValueError, match="lacks seed, data"):
        write_card(folder, record)
    assert (folder / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "audio"}, "'audio'; expected one of tokenizer, chat, gen"),
        ({"lpips_backbone": "vgg"}, "'vgg'"),
        ({"kind": {}}, "has {} as its kind"),
        ({"seconds": float("nan")}, "has nan seconds of training"),
        ({"versions": ["torch"]}, r"has \['torch'\] as its versions"),
        ({"results": [{"task": "a"}]}, "expected task, dataset, split, metric, value"),
        ({"losses": 3}, "has 3 as its losses"),
    ],
)
def test_unknown_kinds_are_refused(folder, record, change, message):
    with pytest.raises(ValueError, match=message):
        write_card(folder, record | change)


def test_missing_folder_is_refused(tmp_path, record):
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_card(tmp_path / "nowhere", record)


def test_only_the_card_is_left_behind(folder, record):
    write_card(folder, record)
    assert [path.name for path in folder.iterdir()] == ["README.md"]
