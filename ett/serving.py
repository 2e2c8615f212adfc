"""What `ett serve` adds to the server of transformers: status 400 and a sentence for requests that cannot be used."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def answering_bad_requests() -> Iterator[None]:
    """Within it, servers that transformers builds answer bad requests with status 400. transformers itself answers an
    image that cannot be read, or a word beyond the vocabulary, with status 500 and no reason."""
    from transformers.cli.serving import server

    build = server.build_server

    def build_checked(model_manager: Any, chat_handler: Any, **handlers: Any) -> Any:
        for handler in (chat_handler, *(handlers.get(f"{name}_handler") for name in ("completion", "response"))):
            if handler is not None:
                handler.handle_request = checked(handler.handle_request)
        app = build(model_manager, chat_handler, **handlers)
        app.add_exception_handler(ValueError, bad_request)
        return app

    server.build_server = build_checked
    try:
        yield
    finally:
        server.build_server = build


def checked(handle: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A handler of requests that refuses, with a `ValueError`, what the server would ignore or stumble over."""

    async def handle_checked(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if body.get("n") not in (None, 1):
            raise ValueError(f"n is {body['n']!r}; this server gives one choice for each request, so leave n out.")
        if "messages" in body and not isinstance(body["messages"], list):
            raise ValueError("messages is no list; give a list of messages, each with a role and a content.")
        stop = body.get("stop")
        if not (stop is None or isinstance(stop, str) or (isinstance(stop, list) and all(map(_is_text, stop)))):
            raise ValueError(f"stop is {stop!r}; expected a text or a list of texts.")
        return await handle(body, *args, **kwargs)

    return handle_checked


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


async def bad_request(request: Any, error: Exception) -> Any:
    """The answer to a request that cannot be used, in the form of OpenAI's API."""
    from starlette.responses import JSONResponse

    message = " ".join(str(error).split())
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)


__all__ = ["answering_bad_requests", "bad_request", "checked"]
