"""How well a model draws what prompts ask for, in GenEval's six categories, judged by the scenes' detector."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.processing_ett import ETTProcessor
from ett.scenes_ett import PROMPT_CATEGORIES, DrawingPrompt
from ett.scenes_ett.detector import detect, satisfies

from .common import batches, evaluating


def evaluate_drawings(
    model: ETTForConditionalGeneration,
    processor: ETTProcessor,
    prompts: Sequence[DrawingPrompt],
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    examples_per_category: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Args:
        prompts: What to draw, such as `[drawing_pair(seed, "test", i)[0] for i in range(300)]`.
        guidance_scale, temperature, top_k, top_p: See `generate`; by default the model's own.
        seed (`int`): With a prompt's number it determines the image, whatever the batch size.

    Returns:
        `categories`: {category: `accuracy` in 0..1, `correct` and `count`}, for the categories among the prompts;
        `mean`, their unweighted mean; `color_score`, the share of the `color_count` prompts that name colours whose
        colours are right (`None` without any); `images`, and the settings; `examples`: the first images of each
        category, each with `prompt`, `category`, `correct`, `color_correct`, `reason` and `image` (PIL).

    Raises:
        ValueError: There is no prompt, or the model cannot draw.
    """
    if not prompts:
        raise ValueError("There is no prompt to draw; give at least one.")
    sampling = model.image_sampling(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    drawings = []
    with evaluating(model), tqdm(desc="Drawings", unit=" images", disable=not progress, total=len(prompts)) as bar:
        for batch in batches(enumerate(prompts), batch_size):
            inputs = processor.prepare_drawing([prompt.text for _, prompt in batch]).to(model.device)
            generators = [_generator(seed, number, model.device) for number, _ in batch]
            codes = model.generate(**inputs, generation_mode="image", generator=generators, **sampling)
            images = processor.post_process_images(model.decode_image_tokens(codes))
            drawings += [_judge(prompt, image) for (_, prompt), image in zip(batch, images, strict=True)]
            bar.update(len(batch))

    by_category = {
        name: [drawing for drawing in drawings if drawing["category"] == name] for name in PROMPT_CATEGORIES
    }
    categories = {name: _score(group, "correct") for name, group in by_category.items() if group}
    colored = _score([drawing for drawing in drawings if drawing["color_correct"] is not None], "color_correct")
    return {
        "categories": categories,
        "mean": sum(score["accuracy"] for score in categories.values()) / len(categories),
        "color_score": colored["accuracy"],
        "color_count": colored["count"],
        "images": len(drawings),
        "seed": seed,
        **sampling,
        # Turn by turn, so that each row of a gallery shows every category.
        "examples": [
            group[turn] for turn in range(examples_per_category) for group in by_category.values() if turn < len(group)
        ],
    }


def _generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _judge(prompt: DrawingPrompt, image) -> dict[str, Any]:
    verdict = satisfies(prompt, detect(image))
    return {
        "prompt": prompt.text,
        "category": prompt.category,
        "correct": verdict.correct,
        "color_correct": verdict.color_correct,
        "reason": verdict.reason,
        "image": image,
    }


def _score(drawings: list[dict[str, Any]], name: str) -> dict[str, Any]:
    correct = sum(drawing[name] for drawing in drawings)
    accuracy = correct / len(drawings) if drawings else None
    return {"accuracy": accuracy, "correct": correct, "count": len(drawings)}


__all__ = ["evaluate_drawings"]
