"""What an error says of a name that is not known."""

import difflib
from collections.abc import Sequence
from typing import Any

NAMES_SHOWN = 20


def suggestion(name: Any, known: Sequence[str]) -> str:
    """A sentence for an error about an unknown name: the known one that is nearest, or those that there are."""
    close = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    more = f" and {len(known) - NAMES_SHOWN} more" if len(known) > NAMES_SHOWN else ""
    return f" Known are: {', '.join(known[:NAMES_SHOWN])}{more}."


__all__ = ["suggestion"]
