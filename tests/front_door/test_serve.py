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


def test_the_server_answers_a_question_about_an_image_as_the_pipeline_does(served, image):
    model, processor = served.load_model_and_processor("ett-chat")
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
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
    assert pipe(str(image), content[1]["text"], max_new_tokens=6)[0]["generated_text"] == answer
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


CHAT = [{"role": "user", "content": "what color is the circle ?"}]


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "messages", "The request has no messages"),
        ({"messages": []}, "messages", "messages is []; expected a list of one or more messages"),
        ({"messages": [{"content": "a"}]}, "messages", "expected messages, each with a role and a content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "A message's content is 3; expected a text"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages", "A part of the content is"),
        ({"messages": [{"role": "user", "tool_calls": [1]}]}, "messages", "this model calls no tools"),
        ({"input": {"a": 1}}, "input", "input is {'a': 1}; expected a text, or a list of parts"),
        ({"prompt": 5}, "prompt", "prompt is 5; expected a text"),
        ({"messages": CHAT, "max_tokens": 1e9}, "messages", "max_tokens is 1000000000.0; expected a whole number"),
        ({"messages": CHAT, "temperature": [1]}, "messages", "temperature is [1]; expected 0, or a number from 0.01"),
        ({"messages": CHAT, "seed": -1}, "messages", "seed is -1; expected a whole number from 0"),
        ({"messages": CHAT, "logit_bias": {"a": 1}}, "messages", "logit_bias is {'a': 1}; expected a mapping"),
        ({"messages": CHAT, "generation_config": "[]"}, "messages", "expected the JSON of a mapping"),
        ({"messages": CHAT, "generation_config": '{"num_beams": 1000000}'}, "messages", "num_beams is 1000000"),
        ({"messages": CHAT, "generation_config": '{"cache_config": {}}'}, "messages", "has the field 'cache_config'"),
        ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "messages", "has no options"),
    ],
)
def test_a_request_with_values_of_other_types_is_refused(body, field, message):
    with pytest.raises(ValueError) as caught:
        serving.check_request(body, field)
    assert message in str(caught.value)


@pytest.mark.parametrize("url", ["/etc/hostname", "file:///etc/hostname", "", 5, {"url": None}])
def test_requests_open_no_files_of_the_server(url):
    content = [{"type": "image_url", "image_url": url}]
    with pytest.raises(ValueError, match="the server opens none of its own files for a request"):
        serving.check_request({"messages": [{"role": "user", "content": content}]}, "messages")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": CHAT, "temperature": 0, "top_p": None, "stream": True, "max_tokens": 8}, "messages"),
        ({"input": [{"type": "input_image", "image_url": "data:image/png;base64,"}]}, "input"),
        ({"input": CHAT, "instructions": "be brief"}, "input"),
        ({"input": "a", "generation_config": '{"max_new_tokens": 4, "eos_token_id": [1, 2]}'}, "input"),
        ({"prompt": "a", "suffix": "b"}, "prompt"),
    ],
)
def test_usual_requests_pass(body, field):
    serving.check_request(body, field)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n is 2; this server returns one choice per request"),
        ({"messages": "hello"}, "messages is 'hello'; expected a list of one or more messages"),
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
    paths = ("/v1/chat/completions", "/v1/audio/transcriptions", "/load_model", "/reset")
    routes = [SimpleNamespace(path=path, endpoint=print) for path in paths]
    app = SimpleNamespace(
        add_exception_handler=lambda kind, handler: handlers.update({kind: handler}),
        router=SimpleNamespace(routes=routes),
        post=lambda path: lambda endpoint: handlers.update({path: endpoint}),
    )
    monkeypatch.setattr(server, "build_server", lambda *args, **kwargs: app)
    plain = server.build_server

    async def handle_request(body, request_id):
        return body

    chat = SimpleNamespace(handle_request=handle_request)
    with serving.answering_bad_requests():
        manager = SimpleNamespace(force_model="ett-chat")
        assert server.build_server(manager, chat, completion_handler=None) is app
    assert server.build_server is plain
    assert [route.path for route in app.router.routes] == ["/v1/chat/completions"]
    with pytest.raises(ValueError, match="model is 5; this server has only ett-chat"):
        asyncio.run(handlers["/load_model"]({"model": 5}))
    with pytest.raises(ValueError, match="n is 3"):
        asyncio.run(chat.handle_request({"n": 3, "messages": CHAT}, "id"))
    pytest.importorskip("starlette")
    response = asyncio.run(handlers[ValueError](None, ValueError("The word 'zebra' is\nunknown.")))
    assert response.status_code == 400 and b"The word 'zebra' is unknown." in response.body


def test_stop_strings_that_a_tokenizer_cannot_have_are_one_sentence(served, image):
    model, processor = served.load_model_and_processor("ett-chat")
    inputs = processor(images=[image], text=["<image> what color is the circle ?"])
    options = {"max_new_tokens": 4, "do_sample": False, "stop_strings": ["red"]}
    # Servers hand the processor on in the tokenizer's place.
    for tokenizer in (processor, processor.tokenizer):
        with pytest.raises(ValueError, match="Stop strings do not work with this model's tokenizer"):
            model.generate(**inputs, **options, tokenizer=tokenizer)
