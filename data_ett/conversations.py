"""The conversation formats of public datasets, made one.

- *Typed* content, as chat templates take it, comes out of everything: a list of `{"type": "image"}` and
  `{"type": "text", "text": ...}`, or a plain text where a turn has no image.
- LLaVA's form (`conversations` of `from` and `value`) and that of `messages` (`role` and `content`) are told apart
  turn by turn; both may hold `<image>` in their text, anywhere and several times.
"""

import json
import re
from typing import Any

from .captions import caption_text

PLACEHOLDER = "<image>"
"""What stands for an image in the texts of datasets; not necessarily the model's own token."""

ROLES = {
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "model", "chatgpt")},
    "system": "system",
}

Message = dict[str, Any]


class ExampleError(ValueError):
    """A row that cannot be learned from, with the reason in one sentence."""


def read_conversation(cell: Any, num_images: int) -> list[Message]:
    """A row's conversation as `role` and typed `content`.

    >>> llava = [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    >>> for message in read_conversation(llava, 1):
    ...     print(message)
    {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}
    {'role': 'assistant', 'content': 'A cat.'}

    Args:
        cell: A list of turns, or its JSON.
        num_images: How many images the row has.

    Raises:
        ExampleError: There are no turns, none is an answer, one is of no known form, or placeholders and images
            differ in number.
    """
    messages = [_read_message(turn) for turn in _turns(cell)]
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ExampleError("The conversation has no answer, so there is nothing to learn from it.")
    placeholders = sum(
        part["type"] == "image" for message in messages for part in message["content"] if isinstance(part, dict)
    )
    if placeholders != num_images:
        remedy = f"write one {PLACEHOLDER}, or one part of type image, for each image where it belongs"
        raise ExampleError(
            f"The conversation has {placeholders} placeholders {PLACEHOLDER} and the row has {num_images} images; "
            f"{remedy}."
        )
    return messages


def _turns(cell: Any) -> list[Any]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise ExampleError(f"The conversation is {cell[:60]!r}; expected a list of turns, or its JSON.") from error
    if not isinstance(cell, list) or not cell:
        raise ExampleError(f"The conversation is {str(cell)[:60]!r}; expected a list of turns.")
    return cell


def _read_message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ExampleError(f"A turn is {str(turn)[:60]!r}; expected a dict of role and content, or of from and value.")
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise ExampleError(f"A turn's role is {role!r}; expected one of {', '.join(ROLES)}.")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    content = content if isinstance(content, list) else caption_text(content)
    if isinstance(content, str):
        parts = _split_text(content)
    elif isinstance(content, list):
        parts = [part for piece in content for part in _read_part(piece)]
    else:
        raise ExampleError(f"A turn's content is {content!r}; expected text, or a list of parts.")
    if any(part["type"] == "image" for part in parts):
        if ROLES[role] != "user":
            raise ExampleError(f"A turn of the {ROLES[role]} holds an image; images stand in the user's turns.")
        return {"role": ROLES[role], "content": parts}
    return {"role": ROLES[role], "content": "".join(part["text"] for part in parts)}


def _read_part(piece: Any) -> list[Message]:
    kind = piece.get("type") if isinstance(piece, dict) else None
    if kind == "image":
        return [{"type": "image"}]
    if kind == "text" and isinstance(piece.get("text"), str):
        return _split_text(piece["text"])
    raise ExampleError(
        f"A part of a turn is {str(piece)[:60]!r}; expected one of type text, or one of type image, whose image "
        "stands in the row's column of images."
    )


def _split_text(text: str) -> list[Message]:
    """A text around its placeholders, without the line breaks that set these apart."""
    parts: list[Message] = []
    for piece in re.split(rf"(\n?{PLACEHOLDER}\n?)", text):
        if PLACEHOLDER in piece:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


__all__ = ["PLACEHOLDER", "ExampleError", "read_conversation"]
