"""Captions as cells of a dataset hold them."""

import math
from typing import Any


def caption_text(value: Any) -> str | None:
    """
    The text of a caption, or `None` where a value is neither text nor a number.

    >>> caption_text("a dog"), caption_text(1984), caption_text(7.0), caption_text(2.5), caption_text(None)
    ('a dog', '1984', '7', '2.5', None)
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, float):
        # A table stores a column of whole numbers as floats where a value is missing.
        value = int(value) if value.is_integer() else value if math.isfinite(value) else None
    return None if value is None else str(value)


def caption_texts(cell: Any) -> list[str]:
    """The texts of a cell, which holds one caption or a list of them."""
    texts = map(caption_text, cell if isinstance(cell, list) else [cell])
    return [text for text in texts if text is not None]


__all__ = ["caption_text", "caption_texts"]
