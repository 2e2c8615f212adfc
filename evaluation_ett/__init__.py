"""How a model is measured: reconstruction, understanding, drawing, and the report of it all."""

from .generation import evaluate_drawings
from .reconstruction import evaluate_reconstruction, reconstruct
from .report import write_report
from .targets import Target, compare_with_targets
from .understanding import evaluate_captions, evaluate_questions

__all__ = [
    "Target",
    "compare_with_targets",
    "evaluate_captions",
    "evaluate_drawings",
    "evaluate_questions",
    "evaluate_reconstruction",
    "reconstruct",
    "write_report",
]
