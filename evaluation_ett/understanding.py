"""How well a model answers questions about scenes and describes them.

- Answers are greedy and count only when they equal the truth; case and a final full stop do not matter.
- Each image is turned into codes once; all its questions share them.
- With the same scenes and seed every model is asked the same questions in the same order.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.processing_ett import ETTProcessor
from ett.scenes_ett import CHANCE, QUESTION_TYPES, Question, Scene, Shape, Text, caption, parse_caption, questions

from .common import answer, batches, encode, evaluating, image_prompt, tokenize

MAX_ANSWER_TOKENS = 8
MAX_CAPTION_TOKENS = 96


def choose_questions(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """At most `count` of the scene's questions, as many types among them as there can be, at random otherwise."""
    asked = questions(scene, rng)
    asked = [asked[index] for index in rng.permutation(len(asked))]
    turns, taken = dict.fromkeys(QUESTION_TYPES, 0), []
    for question in asked:
        taken.append((turns[question.type], len(taken), question))
        turns[question.type] += 1
    return [question for _, _, question in sorted(taken, key=lambda entry: entry[:2])[:count]]


def evaluate_questions(
    model: ETTForConditionalGeneration,
    processor: ETTProcessor,
    scenes: Sequence[Scene],
    questions_per_scene: int = 6,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Args:
        scenes: Held-out scenes, such as `Scenes(seed, "test", 500)`.
        questions_per_scene (`int`): At most; every type that a scene allows comes once before any comes twice.
        seed (`int`): Chooses questions and their wording.

    Returns:
        `types`: {type: `accuracy` and `chance` in 0..1, `correct` and `count`}, for the types that were asked;
        `mean` and `chance`, the unweighted means over these types; `scenes`, `seed` and `fit` (how images
        were fitted); `answers`, normalized, one a
        question; `examples`: of each type the first question answered rightly and the first answered wrongly, each
        with `index` (into `answers`), `type`, `question`, `truth`, `answer`, `correct` and `image` (PIL).

    Raises:
        ValueError: There is no scene.
    """
    _require(scenes)
    images = [scene.render() for scene in scenes]
    codes = encode(model, processor, images, batch_size)
    asked = [
        (number, question)
        for number, scene in enumerate(scenes)
        for question in choose_questions(scene, questions_per_scene, np.random.default_rng([seed, number]))
    ]
    answers: list[str] = []
    with evaluating(model), tqdm(desc="Questions", unit=" questions", disable=not progress, total=len(asked)) as bar:
        for batch in batches(asked, batch_size):
            prompts = [image_prompt(processor, question.question) for _, question in batch]
            said = answer(model, processor, prompts, codes[[number for number, _ in batch]], MAX_ANSWER_TOKENS)
            answers += map(normalize, said)
            bar.update(len(batch))

    types = {name: {"accuracy": 0.0, "correct": 0, "count": 0, "chance": CHANCE[name]} for name in QUESTION_TYPES}
    examples: dict[tuple[str, bool], dict[str, Any]] = {}
    for index, ((number, question), said) in enumerate(zip(asked, answers, strict=True)):
        correct = said == normalize(question.answer)
        types[question.type]["count"] += 1
        types[question.type]["correct"] += correct
        example = {"index": index, "type": question.type, "question": question.question, "truth": question.answer}
        example |= {"answer": said, "correct": correct, "image": images[number]}
        examples.setdefault((question.type, correct), example)
    types = {name: score for name, score in types.items() if score["count"]}
    for score in types.values():
        score["accuracy"] = score["correct"] / score["count"]
    shown = [examples.get((name, correct)) for name in types for correct in (True, False)]
    return {
        "types": types,
        "mean": sum(score["accuracy"] for score in types.values()) / len(types),
        "chance": sum(score["chance"] for score in types.values()) / len(types),
        "scenes": len(scenes),
        "fit": processor.image_processor.fit,
        "seed": seed,
        "answers": answers,
        "examples": [example for example in shown if example is not None],
    }


def evaluate_captions(
    model: ETTForConditionalGeneration,
    processor: ETTProcessor,
    scenes: Sequence[Scene],
    batch_size: int = 64,
    seed: int = 0,
    prompt: str | None = None,
    examples: int = 6,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Args:
        scenes: Held-out scenes, such as `Scenes(seed, "test", 500)`.
        seed (`int`): Chooses the captions' wording.
        prompt (`str`): What is asked of each image, by default `processor.caption_prompt`. With the empty text the
            caption follows the image directly, outside the chat layout that training uses.
        examples (`int`): How many of the first scenes to describe.

    Returns:
        `loss`, the mean cross-entropy in nats of a caption's token (with the one that ends it) given the image, the
        prompt and the tokens before it, over all captions together; `tokens`, their number; `scenes`, `seed` and
        `fit` (how images were fitted);
        `accuracy`, the share of the described scenes whose caption names exactly what is there (None where none was
        described); `attributes`, as [`score_attributes`] gives them for these; `examples`, each with `caption`
        (greedy), `truth`, `correct` (whether it names exactly what is there) and `image` (PIL).

    Raises:
        ValueError: There is no scene.
    """
    _require(scenes)
    images = [scene.render() for scene in scenes]
    codes = encode(model, processor, images, batch_size)
    captions = [caption(scene, np.random.default_rng([seed, number])) for number, scene in enumerate(scenes)]
    prompt = image_prompt(processor, processor.caption_prompt if prompt is None else prompt)
    loss, tokens = 0.0, 0
    with evaluating(model):
        with tqdm(desc="Captions", unit=" captions", disable=not progress, total=len(captions)) as bar:
            for batch in batches(range(len(captions)), batch_size):
                texts = [captions[number] for number in batch]
                batch_loss, batch_tokens = caption_loss(model, processor, prompt, texts, codes[batch])
                loss, tokens = loss + batch_loss, tokens + batch_tokens
                bar.update(len(batch))
        said = []
        for batch in batches(range(min(examples, len(captions))), batch_size):
            said += answer(model, processor, [prompt] * len(batch), codes[batch], MAX_CAPTION_TOKENS)
    described = [
        {
            "caption": text,
            "truth": truth,
            "correct": parse_caption(text) == (scene.shapes, scene.text),
            "image": image,
        }
        for text, truth, scene, image in zip(said, captions, scenes, images, strict=False)
    ]
    return {
        "loss": loss / tokens,
        "tokens": tokens,
        "scenes": len(scenes),
        "fit": processor.image_processor.fit,
        "seed": seed,
        "accuracy": sum(example["correct"] for example in described) / len(described) if described else None,
        "attributes": score_attributes([parse_caption(example["caption"]) for example in described], scenes),
        "examples": described,
    }


def score_attributes(
    said: Sequence[tuple[Sequence[Shape], Text | None]], scenes: Sequence[Scene]
) -> dict[str, float | None]:
    """What captions get right, attribute by attribute, in 0..1; None where there is nothing to count.

    Args:
        said: Of each caption, the shapes and the text that it names.
        scenes: The scenes that they describe; further ones are left out.

    Returns:
        `count`, of the captions those with as many shapes as there are; `place`, of the scenes' shapes those at whose
        place the caption names one; `colour`, `shape` and `size`, of these those with the right one; `word`, of the
        scenes' texts those with the right content.
    """
    pairs = list(zip(said, scenes, strict=False))
    named = []
    for (shapes, _), scene in pairs:
        by_place = {shape.place: shape for shape in shapes}
        named += [(shape, by_place.get(shape.place)) for shape in scene.shapes]
    found = [(truth, shape) for truth, shape in named if shape is not None]
    texts = [(scene.text.content, text and text.content) for (_, text), scene in pairs if scene.text is not None]
    return {
        "count": _share(len(shapes) == len(scene.shapes) for (shapes, _), scene in pairs),
        "place": _share(shape is not None for _, shape in named),
        "colour": _share(truth.color == shape.color for truth, shape in found),
        "shape": _share(truth.shape == shape.shape for truth, shape in found),
        "size": _share(truth.size == shape.size for truth, shape in found),
        "word": _share(truth == content for truth, content in texts),
    }


def _share(verdicts: Iterable[bool]) -> float | None:
    verdicts = list(verdicts)
    return sum(verdicts) / len(verdicts) if verdicts else None


def caption_loss(
    model: ETTForConditionalGeneration,
    processor: ETTProcessor,
    prompt: str,
    captions: list[str],
    image_codes: torch.LongTensor,
) -> tuple[float, int]:
    """Summed cross-entropy of the captions' tokens after `prompt`, and the tokens' number; end tokens count."""
    tokenizer = processor.tokenizer
    before = tokenize(processor, [prompt] * len(captions))
    after = tokenizer(
        [text + processor.end_token for text in captions],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    targets = after["input_ids"].masked_fill(after["attention_mask"] == 0, -100).to(model.device)
    logits = model(
        input_ids=torch.cat([before["input_ids"], after["input_ids"]], dim=1).to(model.device),
        attention_mask=torch.cat([before["attention_mask"], after["attention_mask"]], dim=1).to(model.device),
        image_codes=image_codes,
        logits_to_keep=targets.shape[1] + 1,
    ).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss.item(), int((targets != -100).sum())


def normalize(text: str) -> str:
    """An answer without case, space around it and a final full stop."""
    return text.strip().removesuffix(".").strip().lower()


def _require(scenes: Sequence[Scene]):
    if not len(scenes):
        raise ValueError("There is no scene to ask about; give at least one.")


__all__ = [
    "caption_loss",
    "choose_questions",
    "evaluate_captions",
    "evaluate_questions",
    "normalize",
    "score_attributes",
]
