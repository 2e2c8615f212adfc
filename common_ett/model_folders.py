"""Which kind of model a folder holds."""

from pathlib import Path

from .files import read_fields


def require_model_folder(path: str, expected: str):
    """Checks a local folder's `config.json` before anything is loaded; names on the Hub pass.

    Raises:
        ValueError: The folder is missing, holds no model, or one of another kind.
    """
    folder = Path(path)
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or len(path.split("/")) != 2:
            raise ValueError(f"There is no model folder '{path}'.")
        return
    try:
        config = read_fields(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is no model folder: its config.json is missing or unreadable.") from error
    found = config.get("_class_name") or config.get("model_type")
    if found != expected:
        raise ValueError(f"'{path}' holds a model of kind {found!r:.100}; expected {expected!r}.")


__all__ = ["require_model_folder"]
