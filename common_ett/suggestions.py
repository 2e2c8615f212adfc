"""What an error says of a name that is not known."""

import difflib
from collections.abc import Sequence
from typing import Any


def suggestion(name: Any, known: Sequence[str]) -> str:
    """A sentence for an error about an unknown name: the known one that is nearest, or all of them."""
    close = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known are: {', '.join(known)}."


__all__ = ["suggestion"]
