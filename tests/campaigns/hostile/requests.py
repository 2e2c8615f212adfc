"""Requests to `ett serve`: through its application where the packages of `ett[serve]` are there, else through what
stands behind it."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

from numpy.random import Generator
from PIL import Image
from transformers.utils.import_utils import is_serve_available

from ett import inference, serving

from .images import hostile_image
from .isolation import Place, Refused, Wrong
from .mutations import BROKEN_JSON, hostile_value, mutated, mutated_bytes, pick

PATHS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
}
OTHER_PATHS = (
    *("/v1/models", "/health", "/load_model", "/", "/v1/../../etc/passwd", "/v1/audio/transcriptions", "/reset"),
    "/v1/systemone",
)
METHODS = ("GET", "PUT", "DELETE", "OPTIONS", "BREW")
OPTIONS = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "temperature", "top_p", "seed", "stop", "n"),
    *("stream", "frequency_penalty", "model", "tools", "chat_template_kwargs", "generation_config", "logit_bias"),
    *("stream_options", "suffix", "instructions"),
)
SOURCES = (
    *("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "data:image/png;base64,@", "data:,", ""),
    "a" * 9999,
)
LONGEST = 8
"""Tokens of an answer, unless a request says otherwise."""


def requests(rng: Generator, place: Place) -> Iterator[None]:
    """A request with malformed JSON, wrong types, hostile sizes or damaged images."""
    method, path = "POST", pick(rng, list(PATHS))
    body = _body(rng, path)
    kind = rng.random()
    if kind < 0.45:
        body = mutated(rng, body)
    elif kind < 0.75:
        body[pick(rng, OPTIONS)] = hostile_value(rng)
    content = json.dumps(body).encode()
    if kind > 0.9:
        content = pick(rng, BROKEN_JSON) if rng.random() < 0.5 else mutated_bytes(rng, content)
    if rng.random() < 0.1:
        method, path = pick(rng, ("POST", *METHODS)), pick(rng, (path, *OTHER_PATHS))
    (place.inputs / "request").write_bytes(f"{method} {path}\n\n".encode() + content)
    yield
    model = str(place.models / "ett-chat")
    if is_serve_available():
        status, answer = asyncio.run(_request(model, method, path, content))
    else:
        status, answer = asyncio.run(_handle(model, content))
    sentence = _sentence(answer)
    if status >= 500 or (status == 200 and '{"error"' in answer):
        raise Wrong(f"Status {status}: {answer[:1500]}")
    if status >= 400:
        # A path or a method that is not there needs no reason.
        raise Refused(f"There is none: {sentence}." if status in (404, 405) else sentence)


def _body(rng: Generator, path: str) -> dict[str, Any]:
    field = PATHS[path]
    options = {"max_tokens": LONGEST, "temperature": 0, "stream": bool(rng.random() < 0.3)}
    if field == "prompt":
        return {"prompt": "what is the color ?", **options}
    url = pick(rng, SOURCES) if rng.random() < 0.2 else _data_url(rng)
    if field == "input":
        parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "what is the color ?"}]
        options["max_output_tokens"] = options.pop("max_tokens")
    else:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is the color ?"}]
    return {field: [{"role": "user", "content": parts}], **options}


def _data_url(rng: Generator) -> str:
    if rng.random() < 0.3:
        content = hostile_image(rng)[0][:100_000]
    else:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(file, "PNG")
        content = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode()


async def _request(model: str, method: str, path: str, content: bytes) -> tuple[int, str]:
    """Status and body of the application's answer, without a socket."""
    import uvicorn

    found = []
    with mock.patch.object(uvicorn.Server, "run", lambda self: found.append(self.config.app)):
        inference.serve(model, "localhost", 8000, "cpu")
    sent: list[dict[str, Any]] = []
    events = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive():
        event = next(events, None)
        if event is None:
            # Nobody hangs up before the answer.
            await asyncio.Event().wait()
        return event

    async def send(event: dict[str, Any]):
        sent.append(event)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "server": ("localhost", 8000),
        "client": ("127.0.0.1", 1),
    }
    try:
        await found[0](scope, receive, send)
    except Exception as error:
        # The application answers with status 500 and hands the error on to the server's log.
        raise Wrong(f"Status 500: {type(error).__name__}: {str(error)[:1500]}") from error
    status = next((event["status"] for event in sent if event["type"] == "http.response.start"), 500)
    return status, b"".join(event.get("body", b"") for event in sent).decode(errors="replace")


async def _handle(model: str, content: bytes) -> tuple[int, str]:
    """As [`_request`], by the functions of transformers that make an answer of a chat."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler, GenerationState

    handler = BaseHandler(ModelManager(device="cpu", force_model=model), GenerationState())

    async def answer(body: dict[str, Any]) -> tuple[int, str]:
        _, loaded, processor = handler._resolve_model(body)
        modality = handler.model_manager.get_model_modality(loaded, processor)
        messages = handler.get_processor_inputs_from_messages(body["messages"], modality)
        template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "tokenize": True}
        inputs = processor.apply_chat_template(messages, tools=body.get("tools"), **template)
        config = handler._build_generation_config(body, loaded.generation_config)
        config.max_new_tokens = body.get("max_tokens", LONGEST)
        return 200, processor.decode(loaded.generate(**inputs, generation_config=config)[0])

    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return 400, "The body is no valid JSON."
    if not isinstance(body, dict) or "messages" not in body:
        return 422, "The body is no chat with messages."
    try:
        return await serving.checked(answer)(body)
    except ValueError as error:
        return 400, str(error)


def _sentence(answer: str) -> str:
    """What an answer says of an error, in any of the forms that the server has."""
    try:
        value = json.loads(answer)
    except ValueError:
        return answer
    error = value.get("error", value.get("detail")) if isinstance(value, dict) else value
    if isinstance(error, list):
        error = f"The request is invalid: {'; '.join(str(one.get('msg')) for one in error)}"
    return str(error.get("message") if isinstance(error, dict) else error)


__all__ = ["requests"]
