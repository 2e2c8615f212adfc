"""Loads a room of this project by name, and notices when another module of that name stands in front of it."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class HiddenRoomError(ImportError):
    """Another module has the name of one of ETT's rooms, for example a `train.py` in the working directory."""


def room(name: str) -> ModuleType:
    """Imports a room or a module in it, such as `"train"` or `"modeling_ett.modeling_ibq"`.

    Raises:
        HiddenRoomError: Python finds another module of that name first. It is not executed.
    """
    top = name.partition(".")[0]
    spec = sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)
    expected = Path(__file__).resolve().parents[1] / top / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != expected:
        found = "nothing" if spec is None else spec.origin or ", ".join(spec.submodule_search_locations or ["no file"])
        raise HiddenRoomError(
            f"ETT needs its own package {top!r} ({expected.parent}), but Python finds {found} first; rename that one, "
            "or start Python from another folder."
        )
    return importlib.import_module(name)


__all__ = ["HiddenRoomError", "room"]
