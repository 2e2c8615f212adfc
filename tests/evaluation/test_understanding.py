import numpy as np
import pytest
import torch

from ett.evaluation_ett import evaluate_captions, evaluate_questions, understanding
from ett.evaluation_ett.common import answer, encode, image_prompt
from ett.evaluation_ett.understanding import caption_loss, choose_questions, normalize
from ett.scenes_ett import CHANCE, QUESTION_TYPES, Scenes


@pytest.fixture
def scenes():
    return Scenes(0, "test", 6)


def answering(monkeypatch, function):
    """Replaces the model's answers by `function` of the prompts."""
    monkeypatch.setattr(understanding, "answer", lambda model, processor, prompts, *_: [function(p) for p in prompts])


def test_every_type_is_asked_once_before_any_is_asked_twice(scenes):
    for scene in scenes:
        everything = choose_questions(scene, 1000, np.random.default_rng(0))
        types = {question.type for question in everything}
        chosen = choose_questions(scene, len(types), np.random.default_rng(0))
        assert {question.type for question in chosen} == types
        assert everything[: len(chosen)] == chosen


def test_accuracy_counts_exact_answers_by_type(monkeypatch, model, processor, scenes):
    answering(monkeypatch, lambda prompt: "Yes.")
    scores = evaluate_questions(model, processor, scenes, questions_per_scene=100, batch_size=7, progress=False)
    truths = [
        question
        for number, scene in enumerate(scenes)
        for question in choose_questions(scene, 100, np.random.default_rng([0, number]))
    ]
    yes = sum(question.answer == "yes" for question in truths)
    relations = sum(question.type == "relation" for question in truths)
    assert 0 < yes < relations
    relation = {"accuracy": yes / relations, "correct": yes, "count": relations, "chance": 0.5}
    assert scores["types"]["relation"] == relation
    assert scores["types"]["colour"]["accuracy"] == 0
    assert scores["mean"] == pytest.approx(yes / relations / len(scores["types"]))
    assert scores["chance"] == pytest.approx(np.mean([CHANCE[name] for name in scores["types"]]))
    assert scores["answers"] == ["yes"] * len(truths)


def test_examples_show_right_and_wrong_answers_with_their_images(monkeypatch, model, processor, scenes):
    answering(monkeypatch, lambda prompt: "yes")
    scores = evaluate_questions(model, processor, scenes, questions_per_scene=100, progress=False)
    shown = [(example["type"], example["correct"]) for example in scores["examples"]]
    assert [entry for entry in shown if entry[0] == "relation"] == [("relation", True), ("relation", False)]
    assert [name for name, correct in shown if not correct] == [
        name for name in QUESTION_TYPES if name in scores["types"]
    ]
    for example in scores["examples"]:
        assert scores["answers"][example["index"]] == example["answer"]
        assert (example["answer"] == example["truth"]) == example["correct"]
        assert example["image"].size == (72, 72)


def test_questions_run_through_the_model_and_depend_on_the_seed_alone(model, processor, scenes):
    once, again = (
        evaluate_questions(model, processor, scenes, 2, batch_size=size, seed=3, progress=False) for size in (3, 12)
    )
    assert once["answers"] == again["answers"] and len(once["answers"]) == 12
    assert once["types"] == again["types"]


def test_codes_read_in_a_padded_batch_answer_as_pixels_do_alone(model, processor, scenes):
    images = [scene.render() for scene in scenes][:2]
    codes = encode(model, processor, images, batch_size=1)
    questions = ["what is written?", "how many red squares do you see?"]
    prompts = [image_prompt(processor, question) for question in questions]
    batched = answer(model, processor, prompts, codes, 5)
    for image, question, said in zip(images, questions, batched, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=text)
        tokens = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id
        )
        alone = processor.post_process_image_text_to_text(tokens[:, inputs["input_ids"].shape[1] :])[0]
        assert said == alone.strip()


def test_caption_loss_is_the_models_own_on_the_captions_tokens(model, processor, scenes):
    texts = ["top a small red ring.", "bottom left there is a large blue square, top a small red ring."]
    prompt = image_prompt(processor, processor.caption_prompt)
    images = [scene.render() for scene in scenes][:2]
    with torch.no_grad():
        total, tokens = caption_loss(model, processor, prompt, texts, encode(model, processor, images, 2))
        expected = expected_tokens = 0
        for image, text in zip(images, texts, strict=True):
            length = processor(images=image)["input_ids"].shape[1]
            ids = torch.tensor([processor.tokenizer(text + processor.tokenizer.eos_token)["input_ids"]])
            inputs = processor(images=image)
            input_ids = torch.cat([inputs["input_ids"], ids], dim=1)
            labels = input_ids.clone()
            labels[:, :length] = -100
            loss = model(input_ids=input_ids, pixel_values=inputs["pixel_values"], labels=labels).loss
            expected += loss.item() * ids.shape[1]
            expected_tokens += ids.shape[1]
    assert tokens == expected_tokens
    assert total == pytest.approx(expected, rel=1e-4)


def test_the_empty_prompt_puts_the_caption_right_after_the_image(monkeypatch, model, processor, scenes):
    prompts = []
    monkeypatch.setattr(understanding, "caption_loss", lambda *inputs: prompts.append(inputs[2]) or (1.0, 1))
    for prompt in ("", None):
        evaluate_captions(model, processor, scenes, prompt=prompt, examples=0, progress=False)
    image = processor.image_placeholder()
    assert prompts[0] == image
    assert prompts[1] == f"<|im_start|>user {image}{processor.caption_prompt}<|im_end|><|im_start|>assistant "


def test_caption_loss_of_a_data_set_weighs_tokens_not_batches(model, processor, scenes):
    one = evaluate_captions(model, processor, scenes, batch_size=1, examples=1, progress=False)
    together = evaluate_captions(model, processor, scenes, batch_size=4, examples=1, progress=False)
    assert together["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert together["tokens"] == one["tokens"]


def test_captions_are_right_when_they_name_what_is_there_in_any_wording(monkeypatch, model, processor, scenes):
    said = iter([])

    def describe(model, processor, prompts, *_):
        nonlocal said
        said = [understanding.caption(scenes[0], np.random.default_rng(99)), "top a small red ring."]
        return said

    monkeypatch.setattr(understanding, "answer", describe)
    examples = evaluate_captions(model, processor, scenes, examples=2, progress=False)["examples"]
    assert [example["caption"] for example in examples] == said
    assert [example["correct"] for example in examples] == [True, False]


@pytest.mark.parametrize(("said", "normal"), [(" Top left. ", "top left"), ("two", "two"), ("", "")])
def test_answers_are_compared_without_case_space_and_full_stop(said, normal):
    assert normalize(said) == normal


@pytest.mark.parametrize("evaluate", [evaluate_questions, evaluate_captions])
def test_no_scenes_are_refused(evaluate, model, processor):
    with pytest.raises(ValueError, match="no scene"):
        evaluate(model, processor, [], progress=False)
