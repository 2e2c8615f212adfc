"""How a model is published: its card, and its way to the Hub."""

from .cards import write_card
from .push import push_folder

__all__ = ["push_folder", "write_card"]
