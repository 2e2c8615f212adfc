"""What `ett serve` hands to transformers' server, as far as that goes without the server's own requirements."""

import asyncio
import base64

import pytest
from transformers import pipeline
from transformers.cli import serve
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerateManager
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from typer.testing import CliRunner

import ett
from ett.cli import app


@pytest.fixture
def served(models, monkeypatch):
    monkeypatch.chdir(models)
    manager = ModelManager(device="cpu", force_model="ett-chat")
    yield manager
    manager.shutdown()


def test_the_server_answers_a_question_about_a_picture_as_the_pipeline_does(served, picture):
    model, processor = served.load_model_and_processor("ett-chat")
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what color is the circle ?"},
    ]
    messages = BaseHandler.get_processor_inputs_from_messages(
        [{"role": "user", "content": content}], served.get_model_modality(model, processor)
    )
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tools=None,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
        load_audio_from_video=False,
    )
    model.generation_config.max_new_tokens = 6
    answer, _, _ = asyncio.run(
        GenerateManager().generate_non_streaming(model, processor, inputs, model.generation_config, "")
    )
    pipe = pipeline("image-to-text", model="ett-chat", device="cpu")
    assert pipe(str(picture), content[1]["text"], max_new_tokens=6)[0]["generated_text"] == answer
    assert answer


def test_the_table_that_the_server_asks_leads_to_our_classes(models):
    assert ett.ETTForConditionalGeneration in MODEL_FOR_MULTIMODAL_LM_MAPPING.values()


def test_the_command_hands_on_its_options(models, monkeypatch):
    monkeypatch.chdir(models)
    given = []
    monkeypatch.setattr(serve, "Serve", lambda *args, **kwargs: given.append((args, kwargs)))
    result = CliRunner().invoke(app, ["serve", "--port", "8001", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert given == [(("ett-chat",), {"host": "localhost", "port": 8001, "device": "cpu"})]


def test_a_tokenizer_is_refused(models, monkeypatch):
    monkeypatch.chdir(models)
    result = CliRunner().invoke(app, ["serve", "ett-tokenizer"])
    assert result.exit_code == 1 and "is an IBQ tokenizer" in result.stderr
