"""How a model is measured: reconstruction, understanding, drawing, and the report of it all."""

from .comparison import draw_comparison
from .data_sets import Pictures, choose_size, describe, evaluate_data_set
from .generation import evaluate_drawings
from .reconstruction import evaluate_reconstruction, reconstruct
from .report import write_report
from .targets import Target, compare_with_targets
from .understanding import evaluate_captions, evaluate_questions

__all__ = [
    "Pictures",
    "Target",
    "choose_size",
    "compare_with_targets",
    "describe",
    "draw_comparison",
    "evaluate_captions",
    "evaluate_data_set",
    "evaluate_drawings",
    "evaluate_questions",
    "evaluate_reconstruction",
    "reconstruct",
    "write_report",
]
