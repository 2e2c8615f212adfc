"""What `import ett` costs and what it brings about, each in a fresh interpreter."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ett

ROOT = Path(__file__).parents[2]


def run_python(code: str, cwd: Path, path: str = str(ROOT)) -> str:
    """Output of `code`, run in `cwd`; like a script, it finds modules in `cwd` first."""
    code = f"import sys; sys.path[:0] = ['', {path!r}]\n{code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("auto_class", "name", "expected"),
    [
        ("AutoModelForImageTextToText", "ett-chat", "ETTForConditionalGeneration"),
        ("AutoProcessor", "ett-chat", "ETTProcessor"),
        ("AutoImageProcessor", "ett-tokenizer", "ETTImageProcessor"),
    ],
)
def test_an_auto_class_used_first_after_import_ett_loads_our_class(models, auto_class, name, expected):
    code = f"""
import ett
from transformers import {auto_class}
print(type({auto_class}.from_pretrained({name!r})).__name__)"""
    assert run_python(code, models) == expected


def test_auto_classes_loaded_before_ett_know_it_too(models):
    code = """
from transformers import AutoModelForMultimodalLM
import ett
print(type(AutoModelForMultimodalLM.from_pretrained("ett-gen")).__name__)"""
    assert run_python(code, models) == "ETTForConditionalGeneration"


ROOMS = ("modeling_ett", "processing_ett", "train", "data_ett", "hub_cards", "evaluation_ett", "miniature_ett")


@pytest.mark.parametrize("line", ["import ett.train", "from ett.modeling_ett.modeling_ibq import IBQModel"])
def test_importing_one_room_registers_ett(models, line):
    code = f"""
{line}
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, pipeline
print(type(AutoProcessor.from_pretrained("ett-chat")).__name__)
print(type(AutoImageProcessor.from_pretrained("ett-tokenizer")).__name__)
print(type(AutoModelForImageTextToText.from_pretrained("ett-gen")).__name__)
print(type(pipeline("image-to-text", model="ett-chat")).__name__)"""
    assert run_python(code, models).split() == [
        "ETTProcessor",
        "ETTImageProcessor",
        "ETTForConditionalGeneration",
        "ETTImageToTextPipeline",
    ]


def test_the_auto_model_of_diffusers_finds_the_tokenizer(models):
    code = """
import diffusers, ett
print(type(diffusers.AutoModel.from_pretrained("ett-tokenizer")).__name__)
from ett.modeling_ett.modeling_ibq import IBQModel
print(diffusers.IBQModel is IBQModel)"""
    assert run_python(code, models).split() == ["IBQModel", "True"]


def test_the_pipeline_of_diffusers_and_every_auto_class_load_one_folder(models):
    code = """
import ett, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained("ett-gen")
print(*(type(part).__name__ for part in (pipe, pipe.model, pipe.processor)))
import transformers
for name in ("Model", "ModelForImageTextToText", "ModelForMultimodalLM", "Processor", "ImageProcessor", "Tokenizer"):
    print(type(getattr(transformers, f"Auto{name}").from_pretrained("ett-gen")).__name__)
print(type(diffusers.AutoModel.from_pretrained("ett-gen")).__name__)"""
    pipe, *others = run_python(code, models).splitlines()
    assert pipe.split() == ["ETTTextToImagePipeline", "ETTForConditionalGeneration", "ETTProcessor"]
    assert others[:5] == ["ETTModel", *["ETTForConditionalGeneration"] * 2, "ETTProcessor", "ETTImageProcessor"]
    assert "Tokenizer" in others[5] and others[6] == "ETTModel"


def test_the_literal_pipeline_call_captions_an_image(models, image):
    code = f"""
import ett
from transformers import pipeline
print(list(pipeline("image-to-text", model="ett-chat")({str(image)!r})[0]))"""
    assert run_python(code, models) == "['generated_text']"


def test_every_public_name_can_be_had():
    assert all(getattr(ett, name).__name__ == name for name in ett.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ett' has no attribute 'ETTMdoel'"):
        ett.ETTMdoel  # noqa: B018


def test_a_users_own_modules_never_stand_in_front_of_a_room(tmp_path):
    for room in (*ROOMS, "common_ett", "scenes_ett"):
        (tmp_path / f"{room}.py").write_text("raise SystemExit('executed')")
    code = """
import ett
print(ett.ETTTrainer.__module__, ett.write_card.__module__, ett.Scenes.__module__)"""
    assert run_python(code, tmp_path) == "ett.train.trainer ett.hub_cards.cards ett.scenes_ett.scenes"


def test_an_installed_package_has_one_name_and_holds_every_file(tmp_path):
    sources = tmp_path / "sources"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name for name in tracked.decode().split("\0") if name and not name.startswith(("tests/", "docs/"))]
    for name in names:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    code = f"import os, setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    wheel = run_python(code, sources).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    rooms = {name for name in names if name.split("/")[0] in (*ROOMS, "common_ett", "scenes_ett") and "/" in name}
    assert held == {f"ett/{name}" for name in rooms} | {name for name in names if name.startswith("ett/")}
