"""An exported folder, loaded in a process that can import nothing of ours."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, pipeline
from typer.testing import CliRunner

import ett
from ett.cli import app
from ett.hub_cards import export, export_folder, push, push_folder
from ett.processing_ett import build_word_tokenizer

QUESTION = "what color is it?"

STRANGER = """
import json, sys

OURS = ("ett", "hub_cards", "modeling_ett", "processing_ett", "train")
sys.modules.update(dict.fromkeys(OURS))  # not even where they are installed
importable = []
for name in OURS:
    try:
        importable.append(__import__(name).__name__)
    except ImportError:
        pass

import diffusers, torch, transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import pipeline
from transformers.cli.serving.model_manager import ModelManager

chat, tokenizer, image, question = sys.argv[1:]
torch.use_deterministic_algorithms(True)
loaded = {}
for name in ("Config", "Model", "ModelForImageTextToText", "ModelForMultimodalLM", "Processor", "ImageProcessor"):
    loaded[name] = getattr(transformers, f"Auto{name}").from_pretrained(chat, trust_remote_code=True)
loaded["alone"] = transformers.AutoImageProcessor.from_pretrained(tokenizer, trust_remote_code=True)
vision = {
    "subfolder": diffusers.AutoModel.from_pretrained(chat, subfolder="vision_tokenizer", trust_remote_code=True),
    "folder": diffusers.AutoModel.from_pretrained(tokenizer, trust_remote_code=True),
}
classes = {name: [type(part).__module__, type(part).__name__] for name, part in {**loaded, **vision}.items()}
text_tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
server = ModelManager(device="cpu", trust_remote_code=True)
served = server.load_model_and_processor(chat)
modality = server.get_model_modality(*served).name
server.shutdown()

inputs = loaded["Processor"](images=Image.open(image))
prompt = loaded["Processor"](text=question, generation_mode="image")
pixels = loaded["alone"](Image.open(image), return_tensors="pt").pixel_values
with torch.no_grad():
    tensors = {
        "hidden_states": loaded["Model"](**inputs).last_hidden_state,
        "logits": loaded["ModelForImageTextToText"](**inputs).logits,
        "logits_multimodal": loaded["ModelForMultimodalLM"](**inputs).logits,
        "logits_served": served[0](**served[1](images=Image.open(image))).logits,
        "drawing": loaded["ModelForMultimodalLM"].generate(**prompt, generation_mode="image", do_sample=False),
        "pixels": pixels,
    }
    tensors |= {f"codes_{name}": tokenizer.encode_codes(pixels) for name, tokenizer in vision.items()}
image_text_to_text = pipeline("image-text-to-text", model=chat, trust_remote_code=True)
any_to_any = pipeline("any-to-any", model=chat, trust_remote_code=True)
(drawing,) = any_to_any(text=question, generation_mode="image", generate_kwargs={"do_sample": False})
tensors["any_to_any"] = torch.frombuffer(bytearray(drawing["generated_image"].tobytes()), dtype=torch.uint8)
text_to_image = diffusers.DiffusionPipeline.from_pretrained(
    chat, model=loaded["ModelForMultimodalLM"], processor=loaded["Processor"], trust_remote_code=True
)
latents = {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
tensors["text_to_image"] = text_to_image(question, **latents).images
for pipe in (image_text_to_text, any_to_any, text_to_image):
    classes[type(pipe).__name__] = [type(pipe).__module__, type(pipe).__name__]
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
chat_options = {"text": [{"role": "user", "content": content}], "max_new_tokens": 6, "return_full_text": False}
texts = {
    "caption": pipeline("image-to-text", model=chat, trust_remote_code=True)(image, max_new_tokens=6),
    "answer": image_text_to_text(**chat_options)[0]["generated_text"],
    "any_to_any": any_to_any(**chat_options)[0]["generated_text"],
    "ids": text_tokenizer(question).input_ids,
}
loaded["ModelForImageTextToText"].save_pretrained("again")
loaded["Processor"].save_pretrained("again")
texts["again"] = pipeline("image-to-text", model="again", trust_remote_code=True)(image, max_new_tokens=6)
save_file(tensors, "tensors.safetensors")
report = {"importable": importable, "classes": classes, "texts": texts, "modality": modality}
json.dump(report, open("report.json", "w"))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders `chat`, which also draws, and `tokenizer`, with random weights, as training leaves them; an image."""
    torch.manual_seed(0)
    vision_tokenizer = ett.IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
        vq_embed_dim=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    tokenizer = build_word_tokenizer(["a red circle, at the top.", QUESTION])
    processor = ett.ETTProcessor.from_parts(tokenizer, vision_tokenizer, image_size=8)
    language_model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model = ett.ETTForConditionalGeneration.from_parts(
        language_model,
        vision_tokenizer,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_size=8,
        visual_head=True,
    )
    folder = tmp_path_factory.mktemp("models")
    model.save_pretrained(folder / "chat")
    processor.save_pretrained(folder / "chat")
    vision_tokenizer.save_pretrained(folder / "tokenizer")
    processor.image_processor.save_pretrained(folder / "tokenizer")
    for name in ("chat", "tokenizer"):
        (folder / name / "README.md").write_text("card")
        (folder / name / "training.json").write_text("{}")
        (folder / name / "training").mkdir()
        (folder / name / "training" / "recipe.yaml").touch()
        (folder / name / "training_args.bin").touch()
    Image.linear_gradient("L").resize((12, 8)).convert("RGB").save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for name in ("chat", "tokenizer"):
        assert export_folder(models / name, folder / name) == folder / name
    return folder


@pytest.fixture(scope="module")
def stranger(models, exported, tmp_path_factory):
    """What a process without ETT makes of the exported folders: classes, texts and tensors, and what it printed."""
    folder = tmp_path_factory.mktemp("stranger")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    arguments = [exported / "chat", exported / "tokenizer", models / "image.png", QUESTION]
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(**report, tensors=load_file(folder / "tensors.safetensors"), stderr=result.stderr)


@pytest.fixture(scope="module")
def original(models):
    """The model and the processor that were exported, and what they make of the image."""
    model = ett.ETTForConditionalGeneration.from_pretrained(models / "chat")
    processor = ett.ETTProcessor.from_pretrained(models / "chat")
    return SimpleNamespace(model=model, processor=processor, image=Image.open(models / "image.png"))


def test_nothing_of_ours_could_be_imported(stranger):
    assert stranger.importable == []


@pytest.mark.parametrize(
    ("loaded", "name"),
    [
        ("Config", "ETTConfig"),
        ("Model", "ETTModel"),
        ("ModelForImageTextToText", "ETTForConditionalGeneration"),
        ("ModelForMultimodalLM", "ETTForConditionalGeneration"),
        ("Processor", "ETTProcessor"),
        ("ImageProcessor", "ETTImageProcessor"),
        ("alone", "ETTImageProcessor"),
        ("subfolder", "IBQModel"),
        ("folder", "IBQModel"),
        ("ETTImageTextToTextPipeline", "ETTImageTextToTextPipeline"),
        ("ETTAnyToAnyPipeline", "ETTAnyToAnyPipeline"),
        ("ETTTextToImagePipeline", "ETTTextToImagePipeline"),
    ],
)
def test_each_auto_class_finds_its_class_in_the_folder(stranger, loaded, name):
    module, found = stranger.classes[loaded]
    assert found == name
    assert module.startswith(("transformers_modules.", "diffusers_modules."))


def test_scores_and_hidden_states_are_the_originals(stranger, original):
    inputs = original.processor(images=original.image)
    with torch.no_grad():
        logits = original.model(**inputs).logits
        hidden_states = original.model.model(**inputs).last_hidden_state
    assert torch.equal(stranger.tensors["logits"], logits)
    assert torch.equal(stranger.tensors["logits_multimodal"], logits)
    assert torch.equal(stranger.tensors["logits_served"], logits)
    assert torch.equal(stranger.tensors["hidden_states"], hidden_states)


def test_transformers_serve_takes_it_for_a_model_that_sees_images(stranger):
    assert stranger.modality == "MULTIMODAL"


def test_it_draws_the_same_image(stranger, original):
    prompt = original.processor(text=QUESTION, generation_mode="image")
    codes = original.model.generate(**prompt, generation_mode="image", do_sample=False)
    assert torch.equal(stranger.tensors["drawing"], codes)
    (image,) = original.processor.post_process_images(original.model.decode_image_tokens(codes))
    assert stranger.tensors["any_to_any"].tolist() == np.array(image).flatten().tolist()


def test_its_diffusers_pipeline_draws_the_same_image(stranger, original):
    pipe = ett.ETTTextToImagePipeline(original.model, original.processor)
    codes = pipe(QUESTION, generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert torch.equal(stranger.tensors["text_to_image"], codes)


def test_a_model_that_does_not_draw_is_exported_without_code_for_it(models, tmp_path):
    model = ett.ETTForConditionalGeneration.from_pretrained(models / "chat", visual_head=False)
    shutil.copytree(models / "chat", tmp_path / "chat")
    model.save_pretrained(tmp_path / "chat")
    folder = export_folder(tmp_path / "chat", tmp_path / "exported")
    assert (folder / "modeling_ett.py").is_file()
    assert not (folder / "text_to_image_pipeline_ett.py").exists() and not (folder / "model_index.json").exists()


@pytest.mark.parametrize("where", ["subfolder", "folder"])
def test_diffusers_loads_the_tokenizer_with_the_same_codes(stranger, original, where):
    pixels = original.processor.image_processor(original.image, return_tensors="pt").pixel_values
    assert torch.equal(stranger.tensors["pixels"], pixels)
    codes = original.model.model.vision_tokenizer.encode_codes(pixels)
    assert len(codes.unique()) > 1
    assert torch.equal(stranger.tensors[f"codes_{where}"], codes)


def test_the_literal_image_to_text_call_says_the_same(stranger, models):
    pipe = pipeline("image-to-text", model=str(models / "chat"), device="cpu")
    assert stranger.texts["caption"] == pipe(str(models / "image.png"), max_new_tokens=6)


def test_saved_again_it_keeps_its_pipelines(stranger):
    assert stranger.texts["again"] == stranger.texts["caption"]


def test_chats_are_answered_and_text_is_split_the_same(stranger, models, original):
    pipe = pipeline("image-to-text", model=str(models / "chat"), device="cpu")
    (result,) = pipe(str(models / "image.png"), QUESTION, max_new_tokens=6)
    assert stranger.texts["answer"].strip() == stranger.texts["any_to_any"].strip() == result["generated_text"]
    assert stranger.texts["ids"] == original.processor.tokenizer(QUESTION).input_ids


def test_loading_is_without_complaint(stranger):
    for complaint in ("Traceback", "newly initialized", "not expected", "unexpected", "has been removed", "different"):
        assert complaint not in stranger.stderr


def test_the_models_own_files_are_copied_as_they_are(models, exported):
    for name, added in (
        ("chat", {"config.json", "processor_config.json", "model_index.json"}),
        ("tokenizer", {"config.json", "preprocessor_config.json"}),
    ):
        own = {path.name for path in (models / name).iterdir()} - {"training", "training_args.bin"}
        _, differing, missing = filecmp.cmpfiles(models / name, exported / name, own, shallow=False)
        assert set(differing) == added and not missing
        added_names = {path.name for path in exported.joinpath(name).iterdir()} - own
        assert {Path(added_name).suffix for added_name in added_names} <= {".py", ""}
        assert not (exported / name / "training").exists() and not (exported / name / "training_args.bin").exists()
    assert {path.name for path in (exported / "tokenizer").glob("*.py")} == {
        "image_processing_ett.py",
        "image_reading_ett.py",
        "modeling_ibq.py",
        "loading_ett.py",
        "quantizer_ibq.py",
    }


def test_where_ett_is_installed_the_folder_needs_no_remote_code(models, exported):
    pipe = pipeline("image-to-text", model=str(exported / "chat"), device="cpu")
    assert type(pipe.model) is ett.ETTForConditionalGeneration
    expected = pipeline("image-to-text", model=str(models / "chat"), device="cpu")
    image = str(models / "image.png")
    assert pipe(image, max_new_tokens=6) == expected(image, max_new_tokens=6)


def test_a_pipeline_that_is_loaded_from_it_and_saved_needs_no_remote_code(models, exported, tmp_path):
    ett.ETTTextToImagePipeline.from_pretrained(exported / "chat").save_pretrained(tmp_path)
    drawings = [
        DiffusionPipeline.from_pretrained(folder)(
            QUESTION, generator=torch.Generator().manual_seed(3), output_type="latent"
        ).images
        for folder in (models / "chat", tmp_path)
    ]
    assert torch.equal(*drawings)


def test_what_is_trained_from_it_does_not_name_its_code(exported, tmp_path):
    AutoConfig.from_pretrained(exported / "chat").save_pretrained(tmp_path)
    assert not {"auto_map", "custom_pipelines"} & json.loads((tmp_path / "config.json").read_text()).keys()
    assert "auto_map" not in ett.IBQModel.from_pretrained(exported / "tokenizer").config


def test_weights_in_several_files(models, tmp_path):
    model = ett.ETTForConditionalGeneration.from_pretrained(models / "chat")
    shutil.copytree(models / "chat", tmp_path / "chat")
    (tmp_path / "chat" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "chat", max_shard_size="10KB")
    assert len(list((tmp_path / "chat").glob("*.safetensors"))) > 1
    folder = export_folder(tmp_path / "chat", tmp_path / "exported")
    tokenizer = ett.IBQModel.from_pretrained(folder / "vision_tokenizer")
    expected = model.model.vision_tokenizer.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tokenizer.state_dict().items())


def test_an_exported_folder_is_pushed_with_its_code(exported, monkeypatch):
    uploaded = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, ignore_patterns, **kwargs):
            names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
            uploaded["all"] = set(names)
            uploaded["kept"] = set(export.filter_repo_objects(names, ignore_patterns=ignore_patterns))
            return SimpleNamespace(commit_url="hub:commit/1")

    monkeypatch.setattr(push, "HfApi", Api)
    push_folder(exported / "chat", "me/chat")
    assert {"modeling_ett.py", "vision_tokenizer/modeling_ibq.py"} <= uploaded["kept"] == uploaded["all"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", '{"model_type": "bert"}', "type 'bert'; expected an ETT model or an IBQ tokenizer"),
        ("model.safetensors", None, "no weights"),
        ("processor_config.json", None, "no processor_config.json"),
        ("processor_config.json", "[]", "a processor_config.json without fields"),
        ("processor_config.json", "{}", "a processor_config.json without an image processor"),
        ("config.json", '{"model_type": "ett", "vq_config": 5}', "incomplete or damaged"),
        ("modeling_ett.py", "", "modeling_ett.py already; give the folder that it was exported from"),
        ("model.safetensors", "no tensors", "incomplete or damaged"),
    ],
)
def test_what_is_no_complete_model_is_refused_and_leaves_nothing(models, tmp_path, name, content, message):
    model = shutil.copytree(models / "chat", tmp_path / "chat")
    (model / name).unlink(missing_ok=True)
    if content is not None:
        (model / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        export_folder(model, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_a_model_without_a_part_of_its_tokenizer_is_refused(models, tmp_path):
    model = shutil.copytree(models / "chat", tmp_path / "chat")
    weights = load_file(model / "model.safetensors")
    del weights["model.vision_tokenizer.quant_conv.bias"]
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)incomplete or damaged.*quant_conv.bias"):
        export_folder(model, tmp_path / "exported")


def test_a_folder_that_holds_something_is_left_alone(models, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds something already"):
        export_folder(models / "tokenizer", tmp_path)
    with pytest.raises(ValueError, match=r"mine.txt is a file"):
        export_folder(models / "tokenizer", tmp_path / "mine.txt" / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_export_leaves_nothing(models, tmp_path, monkeypatch):
    def interrupt(path, **fields):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_folder(models / "tokenizer", tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_files_of_one_name_in_two_rooms_are_refused(tmp_path, monkeypatch):
    for room in ("modeling", "processing"):
        (tmp_path / room).mkdir()
        (tmp_path / room / f"{room}.py").write_text("from .common import x\n")
        (tmp_path / room / "common.py").touch()
    monkeypatch.setattr(export, "_HOUSE", tmp_path)
    with pytest.raises(ValueError, match="have the same name"):
        export._sources(("modeling/modeling.py", "processing/processing.py"))


def test_the_discriminator_is_exported_on_request_only(models, tmp_path):
    model = shutil.copytree(models / "tokenizer", tmp_path / "tokenizer")
    (model / "discriminator.safetensors").write_bytes(b"weights")
    plain = export_folder(model, tmp_path / "plain")
    assert not (plain / "discriminator.safetensors").exists()
    arguments = ["export", str(model), str(tmp_path / "with"), "--with-discriminator"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "with" / "discriminator.safetensors").read_bytes() == b"weights"


def test_a_discriminator_that_is_not_there_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match=r"holds no discriminator\.safetensors; leave --with-discriminator out"):
        export_folder(models / "tokenizer", tmp_path / "exported", with_discriminator=True)
    assert not list(tmp_path.iterdir())


def test_the_command(models, tmp_path):
    result = CliRunner().invoke(app, ["export", str(models / "tokenizer"), str(tmp_path / "exported")])
    assert result.exit_code == 0 and "trust_remote_code=True" in result.stdout
    assert (tmp_path / "exported" / "modeling_ibq.py").is_file()
    result = CliRunner().invoke(app, ["export", str(tmp_path / "nowhere"), str(tmp_path / "other")])
    assert result.exit_code == 1 and result.stderr.startswith("ett: There is no folder") and not result.stdout
