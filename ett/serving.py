"""Request checks that `ett serve` adds to the server of transformers: status 400 and a sentence for bad requests."""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health", "/load_model")
"""Paths that the server answers. Paths for audio, for decisions and for unloading the model are removed."""

IMAGE_STARTS = ("http://", "https://", "data:image/")
TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image_url", "input_image")

Check = tuple[str, Callable[[Any], bool]]
"""Expected value of an option: a description and a test."""


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and _is_number(value, low, high)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return value == "" or all(isinstance(text, str) and text for text in texts)


def _are_biases(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(key.isdecimal() and len(key) < 10 and _is_number(bias, -100, 100) for key, bias in value.items())


def _are_ids(value: Any) -> bool:
    return all(_is_whole(number, 0, 2**31) for number in (value if isinstance(value, list) else [value]))


LENGTH: Check = ("a whole number of tokens above 0", lambda value: _is_whole(value, 1, 2**31))
PENALTY: Check = ("a number from -0.9 to 2", lambda value: _is_number(value, -0.9, 2))
FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
TEXT: Check = ("a text", _is_text)
TEMPERATURE: Check = ("0, or a number from 0.01 to 100", lambda value: value == 0 or _is_number(value, 0.01, 100))
SHARE: Check = ("a number from 0.01 to 1", lambda value: _is_number(value, 0.01, 1))
IDS: Check = ("a token id, or a list of token ids", _are_ids)

OPTIONS: dict[str, Check] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), LENGTH),
    **dict.fromkeys(("model", "suffix", "instructions"), TEXT),
    "temperature": TEMPERATURE,
    "top_p": SHARE,
    "frequency_penalty": PENALTY,
    "seed": ("a whole number from 0 to 2^63 - 1", lambda value: _is_whole(value, 0, 2**63 - 1)),
    "stream": FLAG,
    "stop": ("a text or a list of texts", _is_stop),
    "logit_bias": ("a mapping of token ids to numbers from -100 to 100", _are_biases),
    "tools": ("a list of mappings", lambda value: isinstance(value, list) and all(map(_is_mapping, value))),
    "chat_template_kwargs": ("nothing, because the model's chat template has no options", lambda value: value == {}),
}
"""Options of a request. Null selects an option's default."""

GENERATION: dict[str, Check] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "top_k"), LENGTH),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS),
    **dict.fromkeys(("do_sample", "use_cache"), FLAG),
    "temperature": TEMPERATURE,
    **dict.fromkeys(("top_p", "min_p", "typical_p"), SHARE),
    "repetition_penalty": ("a number from 0.1 to 10", lambda value: _is_number(value, 0.1, 10)),
    "num_beams": ("a whole number from 1 to 16", lambda value: _is_whole(value, 1, 16)),
    **dict.fromkeys(("transformers_version", "_from_model_config"), ("anything", lambda value: True)),
}
"""Fields of `generation_config`, the JSON text that `transformers chat` sends."""


@contextmanager
def answering_bad_requests() -> Iterator[None]:
    """Context in which servers built by transformers answer bad requests with status 400 and a reason.

    Without it, an unreadable image or a value of the wrong type gets status 500 and no reason.
    """
    from transformers.cli.serving import server

    build = server.build_server

    def build_checked(model_manager: Any, chat_handler: Any, **handlers: Any) -> Any:
        fields = {"completion": "prompt", "response": "input"}
        chat_handler.handle_request = checked(chat_handler.handle_request, "messages")
        for name, field in fields.items():
            handler = handlers.get(f"{name}_handler")
            if handler is not None:
                handler.handle_request = checked(handler.handle_request, field)
        app = build(model_manager, chat_handler, **handlers)
        app.add_exception_handler(ValueError, bad_request)
        _keep_routes(app, model_manager)
        return app

    server.build_server = build_checked
    try:
        yield
    finally:
        server.build_server = build


def _keep_routes(app: Any, model_manager: Any):
    routes = app.router.routes
    endpoints = {route.path: route.endpoint for route in routes if hasattr(route, "endpoint")}
    routes[:] = [route for route in routes if route.path in ROUTES and route.path != "/load_model"]

    async def load_model(body: dict[str, Any]) -> Any:
        if body.get("model") != model_manager.force_model:
            raise ValueError(
                f"model is {body.get('model')!r:.100}; this server has only {model_manager.force_model}, so name it."
            )
        return await endpoints["/load_model"](body)

    app.post("/load_model")(load_model)


def checked(handle: Callable[..., Awaitable[Any]], field: str | None = None) -> Callable[..., Awaitable[Any]]:
    """Wrap a request handler: check each request by [`check_request`] before the handler receives it.

    Args:
        handle (`Callable`): The handler.
        field (`str`, *optional*): Required field of a request: `messages`, `input` or `prompt`.
    """

    async def handle_checked(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        check_request(body, field)
        return await handle(body, *args, **kwargs)

    return handle_checked


def check_request(body: dict[str, Any], field: str | None = None):
    """Check a request for values that the server would ignore or fail on.

    Args:
        body (`dict`): The request.
        field (`str`, *optional*): Required field: `messages`, `input` or `prompt`.

    Raises:
        ValueError: If a value cannot be used. The message names the given and the expected value.
    """
    if body.get("n") not in (None, 1):
        raise ValueError(f"n is {body['n']!r:.100}; this server returns one choice per request, so leave n out.")
    _check_options(body, OPTIONS)
    if body.get("generation_config") is not None:
        _check_generation_config(body["generation_config"])
    if field is not None and field not in body:
        raise ValueError(f"The request has no {field}; add the {field} that the model should answer.")
    if "messages" in body:
        _check_messages(body["messages"], "messages")
    items = body.get("input")
    if isinstance(items, list) and any(_is_mapping(item) and "role" in item for item in items):
        _check_messages(items, "input")
    elif "input" in body:
        _check_content(items, "input")
    if "prompt" in body and not _is_text(body["prompt"]):
        raise ValueError(f"prompt is {body['prompt']!r:.100}; expected a text.")


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _check_options(given: dict[str, Any], options: dict[str, Check]):
    for name, (expected, is_fit) in options.items():
        if given.get(name) is not None and not is_fit(given[name]):
            raise ValueError(f"{name} is {given[name]!r:.100}; expected {expected}.")


def _check_generation_config(text: Any):
    try:
        fields = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"generation_config is {text!r:.100}; expected the JSON of a mapping.")
    for name in fields.keys() - GENERATION.keys():
        raise ValueError(f"generation_config has the field {name!r:.100}; expected one of {', '.join(GENERATION)}.")
    _check_options(fields, GENERATION)


def _check_messages(messages: Any, name: str):
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{name} is {messages!r:.100}; expected a list of one or more messages, each with a role and a content."
        )
    for message in messages:
        if not _is_mapping(message) or not _is_text(message.get("role")):
            raise ValueError(f"{name} has {message!r:.100}; expected messages, each with a role and a content.")
        if message.get("tool_calls") or message.get("type") not in (None, "message"):
            raise ValueError(f"{name} has {message!r:.100}; this model calls no tools, so leave tool calls out.")
        _check_content(message.get("content"), "A message's content")


def _check_content(content: Any, name: str):
    if _is_text(content):
        return
    if not isinstance(content, list) or not content:
        raise ValueError(f"{name} is {content!r:.100}; expected a text, or a list of parts.")
    for part in content:
        kind = part.get("type") if _is_mapping(part) else None
        if kind in TEXT_TYPES and _is_text(part.get("text")):
            continue
        if kind not in IMAGE_TYPES:
            raise ValueError(
                f"A part of the content is {part!r:.100}; expected a part of type text with a text, or a part of type "
                "image_url with a URL."
            )
        url = part.get("image_url")
        url = url.get("url") if _is_mapping(url) else url
        if not _is_text(url) or not url.startswith(IMAGE_STARTS):
            raise ValueError(
                f"The URL of an image is {url!r:.100}; expected a URL that begins with {', '.join(IMAGE_STARTS)}, "
                "because the server opens none of its own files for a request."
            )


async def bad_request(request: Any, error: Exception) -> Any:
    """Answer a bad request with status 400 and the error message, in the format of OpenAI's API."""
    from starlette.responses import JSONResponse

    message = " ".join(str(error).split())
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)


__all__ = ["answering_bad_requests", "bad_request", "check_request", "checked"]
