"""Errors of other libraries on damaged or hostile files, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_REASON = 300
"""Characters that are quoted of another library's message."""


@contextmanager
def one_sentence(subject: str) -> Iterator[None]:
    """
    Within it, what libraries raise on damaged or hostile files becomes a `ValueError` of one sentence, which begins
    with the `subject`. Errors of files that cannot be opened (`OSError`) pass, and sentences of a plain `ValueError`.
    """
    try:
        yield
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # Almost any type.
        reason = " ".join(str(error).split())
        if type(error) is ValueError and reason == str(error) and len(reason) <= LONGEST_REASON:
            raise
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}..."
        raise ValueError(f"{subject} cannot be used ({type(error).__name__}: {reason}).") from error


__all__ = ["one_sentence"]
