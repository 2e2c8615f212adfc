"""Results as the demo hands them to its report."""

import numpy as np
import pytest

from scenes_ett import CHANCE, PROMPT_CATEGORIES, QUESTION_TYPES, Scenes


@pytest.fixture
def results():
    """Results of a full run, with pictures, as `write_report` documents them."""
    image = Scenes(0, "test")[0].render()

    def understanding(accuracy, answer, examples=()):
        score = {"accuracy": accuracy, "correct": 3, "count": 4}
        types = {name: {**score, "chance": CHANCE[name]} for name in QUESTION_TYPES}
        means = {"mean": accuracy, "chance": float(np.mean(list(CHANCE.values())))}
        return {"types": types, **means, "scenes": 4, "seed": 0, "answers": [answer], "examples": list(examples)}

    def captions(loss):
        example = {"caption": "top a small red ring.", "truth": "a <b>true</b> one.", "correct": False, "image": image}
        return {"loss": loss, "tokens": 90, "scenes": 4, "seed": 0, "accuracy": 0.25, "examples": [example]}

    def reconstruction(psnr, usage):
        reading = {"shapes_read": 0.5, "shapes_read_original": 1.0, "texts_read": None, "texts_read_original": None}
        codes = {"codebook_usage": usage, "perplexity": 300.0}
        return {"images": 4, "psnr": psnr, "ssim": 0.9, "background_shift": 1.5, **codes, **reading}

    question = {"index": 0, "type": "colour", "question": "what color is the ring?", "truth": "red", "answer": "blue"}
    drawing = {
        "prompt": "a red ring",
        "category": "colors",
        "correct": True,
        "color_correct": True,
        "reason": "as asked",
    }
    drawings = {
        "categories": {name: {"accuracy": 0.34, "correct": 17, "count": 50} for name in PROMPT_CATEGORIES},
        "mean": 0.34,
        "color_score": 0.7,
        "color_count": 100,
        "images": 300,
        "guidance_scale": 2.0,
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
        "seed": 7,
        "examples": [{**drawing, "image": image}],
    }
    return {
        "quick": False,
        "seed": 7,
        "seconds": 605.0,
        "peak_memory_gb": 2.25,
        "versions": {"torch": "2.15.0"},
        "settings": {"alpha": 0.25},
        "stages": [
            {
                "name": "semantic",
                "title": "Stage 2",
                "seconds": 300.0,
                "steps": 100,
                "parameters": 1234567,
                "trained": ["tokenizer", "projector"],
                "history": [
                    {"step": 50, "caption_loss": 2.0, "learning_rate": 0.001},
                    {"step": 100, "caption_loss": float("nan"), "lpips_loss": 0.5},
                    {"step": 100, "caption_loss": 1.0},
                ],
            }
        ],
        "reconstruction": {
            "before": reconstruction(24.5, 0.97),
            "after": reconstruction(23.9, 0.625),
            "examples": [{"original": image, "before": image, "after": image}],
        },
        "understanding": {
            "frozen": understanding(0.5, "red"),
            "tuned": understanding(0.612, "blue", [{**question, "correct": False, "image": image}]),
        },
        "captions": {"frozen": captions(0.375), "tuned": captions(0.25), "chat": captions(0.3)},
        "drawings": drawings,
        "unseen": {
            "understanding": {"frozen": understanding(0.125, "red"), "tuned": understanding(0.375, "red")},
            "captions": captions(0.75),
            "drawings": {**drawings, "mean": 0.055},
        },
    }
