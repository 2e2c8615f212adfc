"""How a model is published: its card, its export with its code, and its way to the Hub."""

import ett  # noqa: F401 (registers ETT with the Auto classes)

from .cards import write_card
from .export import export_folder
from .push import push_folder

__all__ = ["export_folder", "push_folder", "write_card"]
