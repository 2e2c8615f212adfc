"""What `import ett` costs and what it brings about, each in a fresh interpreter."""

import subprocess
import sys
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


def test_import_of_ett_loads_no_heavy_library_and_leaves_transformers_lazy(tmp_path):
    code = """
import ett
print(sorted({'torch', 'transformers', 'diffusers', 'PIL', 'typer'} & set(sys.modules)))
import transformers
print('torch' in sys.modules)"""
    assert run_python(code, tmp_path) == "[]\nFalse"


def test_help_of_the_command_line_loads_no_heavy_library(tmp_path):
    code = (
        "from typer.testing import CliRunner; from ett.cli import app\n"
        "assert CliRunner().invoke(app, ['draw', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    assert run_python(code, tmp_path) == "[]"


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


def test_a_configuration_from_the_front_door_makes_a_model(models):
    code = """
from ett import ETTConfig
from transformers import AutoModel
print(type(AutoModel.from_config(ETTConfig.from_pretrained("ett-chat"))).__name__)"""
    assert run_python(code, models) == "ETTModel"


def test_modeling_ett_imported_by_itself_after_ett_is_registered(models):
    code = """
import ett
from ett.modeling_ett.modeling_ett import ETTConfig
from transformers import AutoModelForImageTextToText
print(type(AutoModelForImageTextToText.from_config(ETTConfig.from_pretrained("ett-gen"))).__name__)"""
    assert run_python(code, models) == "ETTForConditionalGeneration"


ROOMS = ("modeling_ett", "processing_ett", "train", "hub_cards", "evaluation_ett", "miniature_ett")


@pytest.mark.parametrize(
    "line",
    [
        *(f"import {room}" for room in ROOMS),
        *(f"from transformers import AutoProcessor; import {room}" for room in ROOMS[:2]),
        "from modeling_ett.modeling_ibq import IBQModel",
    ],
)
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


@pytest.mark.parametrize("line", ["", "from train import run_recipe"])
def test_a_processor_loads_without_import_ett(models, line):
    call = "print(type(ETTProcessor.from_pretrained('ett-chat').image_processor).__name__)"
    code = f"{line}\nfrom processing_ett import ETTProcessor\n{call}"
    assert run_python(code, models) == "ETTImageProcessor"


@pytest.mark.parametrize("line", ["import ett, diffusers", "import diffusers, ett"])
def test_the_auto_model_of_diffusers_finds_the_tokenizer(models, line):
    code = f"""
{line}
print(type(diffusers.AutoModel.from_pretrained("ett-tokenizer")).__name__)
from ett.modeling_ett.modeling_ibq import IBQModel
print(diffusers.IBQModel is IBQModel)"""
    assert run_python(code, models).split() == ["IBQModel", "True"]


@pytest.mark.parametrize("line", ["import ett, diffusers", "import diffusers, ett"])
def test_the_pipeline_of_diffusers_and_every_auto_class_load_one_folder(models, line):
    code = f"""
{line}
pipe = diffusers.DiffusionPipeline.from_pretrained("ett-gen")
print(*(type(part).__name__ for part in (pipe, pipe.model, pipe.processor)))
import transformers
for name in ("Model", "ModelForImageTextToText", "ModelForMultimodalLM", "Processor", "ImageProcessor", "Tokenizer"):
    print(type(getattr(transformers, f"Auto{{name}}").from_pretrained("ett-gen")).__name__)
print(type(diffusers.AutoModel.from_pretrained("ett-gen")).__name__)"""
    pipe, *others = run_python(code, models).splitlines()
    assert pipe.split() == ["ETTTextToImagePipeline", "ETTForConditionalGeneration", "ETTProcessor"]
    assert others[:5] == ["ETTModel", *["ETTForConditionalGeneration"] * 2, "ETTProcessor", "ETTImageProcessor"]
    assert "Tokenizer" in others[5] and others[6] == "ETTModel"


def test_the_literal_pipeline_call_captions_a_picture(models, picture):
    code = f"""
import ett
from transformers import pipeline
print(list(pipeline("image-to-text", model="ett-chat")({str(picture)!r})[0]))"""
    assert run_python(code, models) == "['generated_text']"


def test_models_of_transformers_are_found_as_before(tmp_path):
    code = """
import ett
from transformers import AutoConfig
print(type(AutoConfig.for_model("qwen2")).__name__)"""
    assert run_python(code, tmp_path) == "Qwen2Config"


def test_every_public_name_can_be_had(tmp_path):
    code = "import ett; print([name for name in ett.__all__ if getattr(ett, name).__name__ != name])"
    assert run_python(code, tmp_path) == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ett' has no attribute 'ETTMdoel'"):
        ett.ETTMdoel  # noqa: B018


def test_a_users_own_train_py_is_named_and_not_executed(tmp_path):
    (tmp_path / "train.py").write_text("print('executed')")
    code = """
import ett
try:
    ett.ETTTrainer
except ImportError as error:
    print(error)"""
    message = run_python(code, tmp_path)
    assert message.startswith("ETT needs its own package 'train'") and str(tmp_path / "train.py") in message
    assert "executed" not in message
