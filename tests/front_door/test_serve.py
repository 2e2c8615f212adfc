"""What `ett serve` hands to transformers' server, as far as that goes without the server's own requirements."""

import asyncio
import base64
from types import SimpleNamespace

import pytest
from transformers import pipeline
from transformers.cli import serve
from transformers.cli.serving import server
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerateManager
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from typer.testing import CliRunner

import ett
from ett import serving
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


# Bad requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n is 2; this server gives one choice for each request"),
        ({"messages": "hello"}, "messages is no list"),
        ({"stop": [1]}, "stop is [1]; expected a text or a list of texts"),
    ],
)
def test_a_request_that_would_be_ignored_in_part_is_refused(body, message):
    async def answer(body):
        return "answered"

    assert asyncio.run(serving.checked(answer)({"n": 1, "stop": ["."]})) == "answered"
    with pytest.raises(ValueError) as caught:
        asyncio.run(serving.checked(answer)(body))
    assert message in str(caught.value)


def test_servers_answer_what_cannot_be_used_with_a_sentence(monkeypatch):
    handlers = {}
    app = SimpleNamespace(add_exception_handler=lambda kind, handler: handlers.update({kind: handler}))
    monkeypatch.setattr(server, "build_server", lambda *args, **kwargs: app)
    plain = server.build_server

    async def handle_request(body, request_id):
        return body

    chat = SimpleNamespace(handle_request=handle_request)
    with serving.answering_bad_requests():
        assert server.build_server(None, chat, completion_handler=None) is app
    assert server.build_server is plain
    with pytest.raises(ValueError, match="n is 3"):
        asyncio.run(chat.handle_request({"n": 3}, "id"))
    pytest.importorskip("starlette")
    response = asyncio.run(handlers[ValueError](None, ValueError("The word 'zebra' is\nunknown.")))
    assert response.status_code == 400 and b"The word 'zebra' is unknown." in response.body


def test_stop_strings_that_a_tokenizer_cannot_have_are_one_sentence(served, picture):
    model, processor = served.load_model_and_processor("ett-chat")
    inputs = processor(images=[picture], text=["<image> what color is the circle ?"])
    options = {"max_new_tokens": 4, "do_sample": False, "stop_strings": ["red"]}
    # Servers hand the processor on in the tokenizer's place.
    for tokenizer in (processor, processor.tokenizer):
        with pytest.raises(ValueError, match="Stop strings do not work with this model's tokenizer"):
            model.generate(**inputs, **options, tokenizer=tokenizer)
