from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from ett.hub_cards import push, push_folder


class FakeApi:
    """Records what would be sent to the Hub, without the files that match an ignore pattern."""

    error: Exception | None = None
    repo = None
    uploaded = None

    def create_repo(self, repo_id, private, exist_ok):
        if FakeApi.error is not None:
            raise FakeApi.error
        FakeApi.repo = (repo_id, private, exist_ok)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        names = (path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file())
        kept = sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in ignore_patterns))
        FakeApi.uploaded = (repo_id, kept)
        return SimpleNamespace(commit_url=f"hub:{repo_id}/commit/1")


@pytest.fixture(autouse=True)
def api(monkeypatch):
    monkeypatch.setattr(push, "HfApi", FakeApi)
    for name in ("error", "repo", "uploaded"):
        monkeypatch.setattr(FakeApi, name, None)
    return FakeApi


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "ett-chat"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "ett"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("card")
    return folder


def test_a_model_folder_is_uploaded_to_a_repository_that_is_made(api, folder):
    assert push_folder(folder, "ett-chat", private=True) == "hub:me/ett-chat/commit/1"
    assert api.repo == ("ett-chat", True, True)
    assert api.uploaded == ("me/ett-chat", ["README.md", "config.json", "model.safetensors"])


def test_a_tokenizer_in_diffusers_format_is_a_model_folder(api, folder):
    (folder / "config.json").write_text('{"_class_name": "IBQModel"}')
    push_folder(folder, "me/ett-tokenizer")
    assert api.repo == ("me/ett-tokenizer", False, True)


def test_training_state_and_pickles_stay_behind(api, folder):
    for name in (
        "checkpoint-10/model.safetensors",
        "checkpoint-10/optimizer.pt",
        "training/recipe.yaml",
        "runs/events.1",
        ".cache/x",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    for name in ("optimizer.safetensors", "training_args.bin", "old.ckpt", "training.json"):
        (folder / name).touch()
    push_folder(folder, "me/ett-chat")
    assert api.uploaded[1] == ["README.md", "config.json", "model.safetensors", "training.json"]


def test_the_discriminator_is_uploaded_on_request_only(api, folder):
    (folder / "discriminator.safetensors").touch()
    push_folder(folder, "me/ett-chat")
    assert api.uploaded[1] == ["README.md", "config.json", "model.safetensors"]
    push_folder(folder, "me/ett-chat", with_discriminator=True)
    assert api.uploaded[1] == ["README.md", "config.json", "discriminator.safetensors", "model.safetensors"]


def test_a_discriminator_that_is_not_there_is_refused_before_anything_is_sent(api, folder):
    with pytest.raises(ValueError, match=r"holds no discriminator\.safetensors; leave --with-discriminator out"):
        push_folder(folder, "me/ett-chat", with_discriminator=True)
    assert api.repo is None


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("README.md", "no model card")],
)
def test_an_incomplete_folder_is_refused_before_anything_is_sent(api, folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        push_folder(folder, "me/ett-chat")
    assert api.repo is None


def test_weights_that_would_not_be_uploaded_do_not_count(folder):
    (folder / "model.safetensors").rename(folder / "optimizer.safetensors")
    with pytest.raises(ValueError, match="no weights"):
        push_folder(folder, "me/ett-chat")


@pytest.mark.parametrize(
    ("config", "message"),
    [('{"model_type": "bert"}', "type 'bert'"), ("[]", "without fields"), ("{", "not valid JSON")],
)
def test_other_models_are_refused(folder, config, message):
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        push_folder(folder, "me/ett-chat")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        push_folder(tmp_path / "nowhere", "me/ett-chat")


def test_offline_is_said_in_a_sentence(api, folder, monkeypatch):
    monkeypatch.setattr(api, "error", OfflineModeIsEnabled("..."))
    with pytest.raises(ConnectionError, match="unset HF_HUB_OFFLINE"):
        push_folder(folder, "me/ett-chat")


def test_a_failed_connection_is_said_in_a_sentence(api, folder, monkeypatch):
    monkeypatch.setattr(api, "error", HTTPError("name resolution failed"))
    with pytest.raises(ConnectionError, match="me/ett-chat failed: name resolution failed"):
        push_folder(folder, "me/ett-chat")
