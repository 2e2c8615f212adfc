"""Loading that ends in one sentence where files are damaged, hostile or incomplete."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def load_whole(model_class: Any, source: str, new: tuple[str, ...] = (), **kwargs) -> Any:
    """
    As `model_class.from_pretrained(source, **kwargs)`, but for an error where the weights lack a tensor, to which that
    gives random values.

    Args:
        model_class: A class of transformers or diffusers.
        source (`str`): Folder or Hub repository.
        new (`tuple[str, ...]`): Beginnings of the names of tensors that the weights need not have.

    Raises:
        OSError, ValueError: As `from_pretrained`, or a tensor is missing.
    """
    model, info = model_class.from_pretrained(source, output_loading_info=True, **kwargs)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(new))
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"The weights of '{source}' lack {missing[0]}{others}; save or download them again.")
    return model


__all__ = ["load_whole", "one_sentence"]
