"""Results as the demo hands them to its report."""

import numpy as np
import pytest

from ett.scenes_ett import CHANCE, PROMPT_CATEGORIES, QUESTION_TYPES, Scenes


@pytest.fixture
def results():
    """Results of a full run, with images, as `write_report` documents them."""
    image = Scenes(0, "test")[0].render()

    def understanding(accuracy, examples=()):
        score = {"accuracy": accuracy, "correct": round(100 * accuracy), "count": 100}
        types = {name: {**score, "chance": CHANCE[name]} for name in QUESTION_TYPES}
        means = {"mean": accuracy, "chance": float(np.mean(list(CHANCE.values())))}
        return {"types": types, **means, "scenes": 4, "seed": 0, "answers": [], "examples": list(examples)}

    def captions(loss):
        truth = "top a large red ring, and the word dog at the middle."
        example = {"caption": "top a small red ring.", "truth": truth, "correct": False, "image": image}
        true = {**example, "caption": "top a large blue cross.", "truth": "top a large blue cross.", "correct": True}
        attributes = {"count": 1.0, "place": 1.0, "colour": 0.875, "shape": 0.75, "size": 0.5, "word": 0.0}
        measured = {"accuracy": 0.25, "attributes": attributes, "examples": [example, true]}
        return {"loss": loss, "tokens": 90, "scenes": 4, "seed": 0, **measured}

    def reconstruction(psnr, usage):
        reading = {"shapes_read": 0.5, "shapes_read_original": 1.0, "texts_read": None, "texts_read_original": None}
        codes = {"codebook_usage": usage, "perplexity": 300.0}
        return {"images": 4, "psnr": psnr, "ssim": 0.9, "background_shift": 1.5, **codes, **reading}

    question = {"index": 0, "type": "colour", "question": "what color is the ring?", "truth": "red", "answer": "blue"}
    wrong = {
        "prompt": "an orange ring",
        "category": "colors",
        "correct": False,
        "color_correct": True,
        "reason": "No orange ring was found.",
        "image": image,
    }
    right = {**wrong, "prompt": "a red cross", "correct": True, "reason": "as asked"}
    generation = {
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
        "examples": [wrong, right],
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
                    {"step": 25, "loss": 2.25, "caption_loss": 2.0, "learning_rate": 0.001},
                    {"step": 50, "loss": float("nan"), "caption_loss": float("nan"), "lpips_loss": 0.5},
                    {"step": 100, "loss": 1.25, "caption_loss": 1.0},
                ],
            }
        ],
        "reconstruction": {
            "before": reconstruction(24.5, 0.97),
            "after": reconstruction(23.9, 0.625),
            "examples": [{"original": image, "before": image, "after": image}],
        },
        "semantic_captions": {**captions(0.25), "accuracy": None, "examples": []},
        "understanding": understanding(0.612, [{**question, "correct": False, "image": image}]),
        "captions": captions(0.375),
        "generation": generation,
        "unseen": {
            "understanding": understanding(0.375),
            "captions": captions(0.75),
            "generation": {**generation, "mean": 0.055, "examples": [{**wrong, "prompt": "a green circle"}]},
        },
    }


@pytest.fixture
def study():
    """A summary of a study, as `write_report` documents it: better, worse, open, and of one seed."""

    def row(name, unit, frozen, tuned, difference, half=0.0):
        def estimate(mean):
            low, high = (mean - half, mean + half) if half else (None, None)
            return {"mean": mean, "low": low, "high": high}

        sides = {"frozen": estimate(frozen), "tuned": estimate(tuned), "difference": estimate(difference)}
        return {"name": name, "unit": unit, **sides, "seeds": 5 if half else 1, "paper": None}

    return {
        "note": "Textured scenes <b>and</b> five seeds.",
        "rows": [
            {**row("questions right", "%", 0.48, 0.553, 0.073, 0.01), "paper": "54.8 to 60.0"},
            row("caption loss", "nats", 0.45, 0.28, -0.17, 0.02),
            row("PSNR", "dB", 22.5, 22.0, -0.5, 0.25),
            row("relations right", "%", 0.5, 0.51, 0.01, 0.02),
            row("images right", "%", 0.3, 0.4, 0.1),
        ],
    }
