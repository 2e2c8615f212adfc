"""What is said about scenes: captions, questions with their answers, and the words that all of it is made of.

- Texts are lower case. A caption names the shapes in raster order, each with its place first, and the text last.
- Every question has one right answer that follows from the scene alone; ambiguous ones are never asked.
- The same scene is worded differently by different random generators, and equally by equal ones.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .scenes import COLORS, MAX_SHAPES, NUMBERS, PLACES, ROWS, SHAPES, SIZES, WORDS, Scene, Shape, Text, pick

QUESTION_TYPES = ("colour", "shape", "count", "position", "relation", "reading")
COUNT_WORDS = ("one", "two", "three", "four")
RELATIONS = ("above", "below", "left of", "right of")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}

CHANCE = {
    "colour": 1 / len(COLORS),
    "shape": 1 / len(SHAPES),
    "count": 1 / MAX_SHAPES,
    "position": 1 / len(PLACES),
    "relation": 1 / 2,
    "reading": 1 / (len(WORDS) + len(NUMBERS)),
}
"""The accuracy of a uniform guess among a question type's possible answers, in 0..1."""

_SHAPE_OPENERS = ("", "there is ", "you can see ")
_TEXT_FORMS = (
    "the {kind} {content} at the {row}",
    "at the {row} the {kind} {content}",
    "at the {row} it says {content}",
)
_BY_PLACE = ("the shape at the {place}", "the {place} shape")
_COLOUR_FORMS = ("what color is {what}?", "what is the color of {what}?", "which color does {what} have?")
_SHAPE_BY_COLOR_FORMS = ("what shape is {color}?", "which shape is {color}?", "what is the {color} shape?")
_SHAPE_BY_PLACE_FORMS = ("what shape is at the {place}?", "which shape is at the {place}?")
_COUNT_FORMS = ("how many {what} are there?", "how many {what} do you see?", "count the {what}.")
_POSITION_FORMS = ("where is the {color} {shape}?", "at which place is the {color} {shape}?")
_RELATION_FORMS = ("is the {first} {relation} the {second}?", "does the {first} lie {relation} the {second}?")
_READING_FORMS = ("what does the text say?", "what is written?", "which {kind} is written?")

_ITEM = re.compile(
    rf"(?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))}) (?:there is |you can see )?"
    rf"an? (?P<size>{'|'.join(SIZES)}) (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})\b"
)
_TEXT_ITEMS = (
    re.compile(rf"\bthe (?:word|number) (?P<content>\w+) at the (?P<row>{'|'.join(ROWS)})\b"),
    re.compile(rf"\bat the (?P<row>{'|'.join(ROWS)}) (?:the (?:word|number)|it says) (?P<content>\w+)"),
)


@dataclass(frozen=True)
class Question:
    """A question of `type` (of QUESTION_TYPES) and its answer, of one or two words."""

    type: str
    question: str
    answer: str


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence that names every shape and the text, 45 words at most; it does not speak of the background."""
    preposition = pick(rng, ("", "at the "))
    opener = pick(rng, _SHAPE_OPENERS)
    parts = []
    for index, shape in enumerate(scene.shapes):
        verb = opener if index == 0 else ""
        parts.append(f"{preposition}{shape.place} {verb}a {shape.size} {shape.color} {shape.shape}")
    separator = pick(rng, (", ", " and "))
    sentence = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + separator + parts[-1]
    if scene.text is not None:
        said = pick(rng, _TEXT_FORMS).format(kind=scene.text.kind, content=scene.text.content, row=scene.text.row)
        sentence += f", and {said}"
    return f"{sentence}."


def parse_caption(text: str) -> tuple[tuple[Shape, ...], Text | None]:
    """The shapes and the text that a caption names, in its order; what it says in no known wording is passed over."""
    words = " ".join(re.findall(r"\w+", text.lower()))
    shapes = tuple(Shape(m["color"], m["shape"], m["size"], m["place"]) for m in _ITEM.finditer(words))
    for pattern in _TEXT_ITEMS:
        if match := pattern.search(words):
            return shapes, Text(match["content"], match["row"])
    return shapes, None


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions that have one right answer, each in one random wording, in the order of QUESTION_TYPES.

    Things are named by colour or kind only where that singles them out. Relation questions ask only about shapes in
    different rows ("above", "below") or columns ("left of", "right of"), and "yes" is as likely as "no".
    """
    colors = Counter(shape.color for shape in scene.shapes)
    kinds = Counter(shape.shape for shape in scene.shapes)
    pairs = Counter((shape.color, shape.shape) for shape in scene.shapes)
    asked: list[Question] = []

    def ask(question_type: str, forms: tuple[str, ...], answer: str, **slots: str) -> None:
        asked.append(Question(question_type, pick(rng, forms).format(**slots), answer))

    for shape in scene.shapes:
        ask("colour", _COLOUR_FORMS, shape.color, what=pick(rng, _BY_PLACE).format(place=shape.place))
        if kinds[shape.shape] == 1:
            ask("colour", _COLOUR_FORMS, shape.color, what=f"the {shape.shape}")
    for shape in scene.shapes:
        ask("shape", _SHAPE_BY_PLACE_FORMS, shape.shape, place=shape.place)
        if colors[shape.color] == 1:
            ask("shape", _SHAPE_BY_COLOR_FORMS, shape.shape, color=shape.color)
    ask("count", _COUNT_FORMS, COUNT_WORDS[len(scene.shapes) - 1], what="shapes")
    for (color, kind), count in pairs.items():
        if count > 1:
            ask("count", _COUNT_FORMS, COUNT_WORDS[count - 1], what=f"{color} {PLURALS[kind]}")
    singled_out = [shape for shape in scene.shapes if pairs[shape.color, shape.shape] == 1]
    for shape in singled_out:
        ask("position", _POSITION_FORMS, shape.place, color=shape.color, shape=shape.shape)
    for index, earlier in enumerate(singled_out):
        for later in singled_out[index + 1 :]:
            for axis, relations in (("row", RELATIONS[:2]), ("column", RELATIONS[2:])):
                first, second = (earlier, later) if rng.integers(2) else (later, earlier)
                difference = getattr(second, axis) - getattr(first, axis)
                if difference == 0:
                    continue
                relation = pick(rng, relations)
                names = {"first": f"{first.color} {first.shape}", "second": f"{second.color} {second.shape}"}
                is_true = (difference > 0) == (relation == relations[0])
                ask("relation", _RELATION_FORMS, "yes" if is_true else "no", relation=relation, **names)
    if scene.text is not None:
        ask("reading", _READING_FORMS, scene.text.content, kind=scene.text.kind)
    return asked


def split_words(text: str) -> list[str]:
    """The text in lower case as words and single punctuation marks: the tokens that `vocabulary` lists."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def vocabulary() -> list[str]:
    """Every word and punctuation mark that captions, questions, answers and prompts can contain, sorted; WORDS and
    NUMBERS, the texts in images, are among them."""
    forms = (*_SHAPE_OPENERS, *_TEXT_FORMS, *_BY_PLACE, *_COLOUR_FORMS, *_SHAPE_BY_COLOR_FORMS, *_SHAPE_BY_PLACE_FORMS)
    forms += (*_COUNT_FORMS, *_POSITION_FORMS, *_RELATION_FORMS, *_READING_FORMS)
    fixed = " ".join(re.sub(r"{\w+}", " ", form) for form in forms)
    named = (*COLORS, *SHAPES, *PLURALS.values(), *SIZES, *PLACES, *ROWS, *WORDS, *NUMBERS, *COUNT_WORDS, *RELATIONS)
    extra = "a an at the and word number shapes yes no . ,"
    return sorted(set(split_words(" ".join((fixed, *named, extra)))))


__all__ = [
    "CHANCE",
    "COUNT_WORDS",
    "PLURALS",
    "QUESTION_TYPES",
    "RELATIONS",
    "Question",
    "caption",
    "parse_caption",
    "questions",
    "split_words",
    "vocabulary",
]
