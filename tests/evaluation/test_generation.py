import numpy as np
import pytest

from ett.evaluation_ett import evaluate_drawings, generation
from ett.scenes_ett import PROMPT_CATEGORIES, drawing_pair

PAIRS = [drawing_pair(0, "test", index) for index in range(12)]
PROMPTS = [prompt for prompt, _ in PAIRS]


def drawing(monkeypatch, images):
    """Replaces what comes out of the model by these images, one after another."""
    source = iter(images)
    judge = generation._judge
    monkeypatch.setattr(generation, "_judge", lambda prompt, image: judge(prompt, next(source)))


def test_scenes_that_show_what_was_asked_score_full_marks(monkeypatch, model, processor):
    drawing(monkeypatch, [scene.render() for _, scene in PAIRS])
    scores = evaluate_drawings(model, processor, PROMPTS, batch_size=12, progress=False)
    assert scores["categories"] == {name: {"accuracy": 1, "correct": 2, "count": 2} for name in PROMPT_CATEGORIES}
    assert (scores["mean"], scores["color_score"], scores["color_count"], scores["images"]) == (1, 1, 4, 12)


def test_the_mean_weighs_categories_alike(monkeypatch, model, processor):
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[9]]
    drawing(monkeypatch, [PAIRS[0][1].render(), PAIRS[0][1].render(), PAIRS[0][1].render()])
    scores = evaluate_drawings(model, processor, prompts, progress=False)
    assert scores["categories"]["colors"] == {"accuracy": 0, "correct": 0, "count": 2}
    assert scores["mean"] == 0.5


def test_examples_show_each_category_in_turn_with_its_verdict(model, processor):
    scores = evaluate_drawings(model, processor, PROMPTS, examples_per_category=2, progress=False)
    assert [example["category"] for example in scores["examples"]] == list(PROMPT_CATEGORIES) * 2
    assert [example["prompt"] for example in scores["examples"]] == [prompt.text for prompt in PROMPTS]
    assert all(example["image"].size == (72, 72) and example["reason"] for example in scores["examples"])


def test_a_drawing_depends_on_seed_and_number_and_not_on_its_batch(model, processor):
    def images(seed, batch_size):
        scores = evaluate_drawings(model, processor, PROMPTS[:3], seed=seed, batch_size=batch_size, progress=False)
        return np.stack([example["image"] for example in scores["examples"]]).astype(int)

    together = images(0, 3)
    # Decoding a batch may round a level otherwise than decoding one image; another code would change far more.
    assert np.abs(together - images(0, 1)).max() <= 1
    assert np.abs(together - images(1, 3)).max() > 10


def test_no_color_score_where_no_prompt_names_colours(model, processor):
    scores = evaluate_drawings(model, processor, PROMPTS[:1], progress=False)
    assert (scores["color_score"], scores["color_count"]) == (None, 0)


def test_no_prompts_are_refused(model, processor):
    with pytest.raises(ValueError, match="no prompt"):
        evaluate_drawings(model, processor, [], progress=False)
