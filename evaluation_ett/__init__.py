"""How a model is measured: reconstruction, understanding, generation."""

import ett  # noqa: F401 (registers ETT with the Auto classes)

from .comparison import draw_comparison
from .data_sets import Images, SceneImages, choose_size, describe, evaluate_data_set
from .generation import evaluate_drawings
from .inspection import describe_inspection, inspect_tokenizer
from .reconstruction import evaluate_reconstruction, reconstruct
from .understanding import evaluate_captions, evaluate_questions

__all__ = [
    "Images",
    "SceneImages",
    "choose_size",
    "describe",
    "describe_inspection",
    "draw_comparison",
    "evaluate_captions",
    "evaluate_data_set",
    "evaluate_drawings",
    "evaluate_questions",
    "evaluate_reconstruction",
    "inspect_tokenizer",
    "reconstruct",
]
