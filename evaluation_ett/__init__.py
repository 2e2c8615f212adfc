"""How a model is measured: reconstruction, understanding, generation."""

from .comparison import draw_comparison
from .data_sets import Pictures, choose_size, describe, evaluate_data_set
from .generation import evaluate_drawings
from .reconstruction import evaluate_reconstruction, reconstruct
from .understanding import evaluate_captions, evaluate_questions

__all__ = [
    "Pictures",
    "choose_size",
    "describe",
    "draw_comparison",
    "evaluate_captions",
    "evaluate_data_set",
    "evaluate_drawings",
    "evaluate_questions",
    "evaluate_reconstruction",
    "reconstruct",
]
