"""The embedded data set "scenes": pictures drawn on the fly, what is said of them, and a detector to read them."""

from .detector import DetectedScene, Verdict, detect, satisfies
from .drawing import PROMPT_CATEGORIES, DrawingPrompt, drawing_pair, parse_prompt
from .language import (
    CHANCE,
    QUESTION_TYPES,
    RELATIONS,
    Question,
    caption,
    parse_caption,
    questions,
    split_words,
    vocabulary,
)
from .rendering import IMAGE_SIZE, Background
from .scenes import (
    COLORS,
    NUMBERS,
    PLACES,
    ROWS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    WORDS,
    Scene,
    Scenes,
    Shape,
    Text,
)

__all__ = [
    "CHANCE",
    "COLORS",
    "IMAGE_SIZE",
    "NUMBERS",
    "PLACES",
    "PROMPT_CATEGORIES",
    "QUESTION_TYPES",
    "RELATIONS",
    "ROWS",
    "SHAPES",
    "SIZES",
    "UNSEEN_PAIRS",
    "WORDS",
    "Background",
    "DetectedScene",
    "DrawingPrompt",
    "Question",
    "Scene",
    "Scenes",
    "Shape",
    "Text",
    "Verdict",
    "caption",
    "detect",
    "drawing_pair",
    "parse_caption",
    "parse_prompt",
    "questions",
    "satisfies",
    "split_words",
    "vocabulary",
]
