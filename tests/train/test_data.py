"""From examples to batches: what is predicted, what is skipped, what is an error."""

import doctest
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import ett.data_ett.collator
from ett import scenes_ett
from ett.common_ett.images import to_unit_range
from ett.data_ett import IGNORED
from ett.train import ETTCollator, FolderExamples, InMemoryDataset, PreparedDataset, SceneExamples

NUM_CODES = 81


def predicted_texts(processor, item):
    """The runs of predicted tokens, decoded."""
    runs, previous = [], False
    for token, label in zip(item["input_ids"], item["labels"], strict=True):
        if label != IGNORED:
            assert label == token
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = label != IGNORED
    return [processor.tokenizer.decode(run) for run in runs]


def as_decoded(processor, text):
    return processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


# Tasks


def test_of_a_caption_the_words_and_the_end_are_predicted(processor):
    examples = SceneExamples("caption", 0, "train", 1)
    item = PreparedDataset(examples, "caption", processor)[0]
    assert item["input_ids"].count(processor.image_token_id) == NUM_CODES
    assert "describe the image." in processor.tokenizer.decode(item["input_ids"])
    assert predicted_texts(processor, item) == [as_decoded(processor, examples[0]["text"] + "<|im_end|>")]
    assert item["input_ids"][-1] == processor.tokenizer.eos_token_id
    assert item["pixel_values"].dtype == torch.uint8 and tuple(item["pixel_values"].shape) == (1, 3, 72, 72)


def independent_item(processor, turns=4):
    examples = SceneExamples("chat", 0, "train", 40, turns - 1, independent_turns=True)
    index = next(i for i in range(40) if len(examples[i]["messages"]) == 2 * turns)
    item = PreparedDataset(examples, "chat", processor, independent_turns=True)[index]
    return examples[index], item


def test_independent_turns_share_the_image_alone(processor):
    example, item = independent_item(processor)
    assert item["input_ids"].count(processor.image_token_id) == NUM_CODES
    answers = [message["content"] for message in example["messages"] if message["role"] == "assistant"]
    assert predicted_texts(processor, item) == [as_decoded(processor, answer + "<|im_end|>") for answer in answers]
    for number, question in enumerate(example["messages"][::2], 1):
        numbered = zip(item["input_ids"], item["branches"], strict=True)
        own = [token for token, branch in numbered if branch in (0, number)]
        alone = {"images": example["images"], "messages": example["messages"][2 * number - 2 : 2 * number]}
        text = [part for part in question["content"] if part["type"] == "text"]
        alone["messages"][0] = {"role": "user", "content": [{"type": "image"}, *text]}
        assert own == PreparedDataset([alone], "chat", processor)[0]["input_ids"]


def test_the_answer_to_an_independent_turn_is_what_it_would_be_alone(
    processor, make_model, make_language_model, make_vision_tokenizer
):
    _, item = independent_item(processor)
    batch = ETTCollator(processor.tokenizer.pad_token_id)([item, item])
    branches = torch.tensor(item["branches"])
    own = (branches == 0) | (branches == 3)
    model = make_model(
        make_language_model(vocab_size=len(processor.tokenizer)),
        make_vision_tokenizer(patch_size=4),
        image_token_id=processor.image_token_id,
    )
    with torch.no_grad():
        together = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0, own]
        alone = model(input_ids=batch["input_ids"][:1, own], pixel_values=batch["pixel_values"][:1]).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_independent_turns_must_alternate(processor):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    prepared = PreparedDataset([{"images": [], "messages": messages}], "chat", processor, independent_turns=True)
    with pytest.raises(ValueError, match="user and assistant alternate, the user first; one has the roles user, user"):
        prepared[0]


@pytest.mark.parametrize("index", range(8))
def test_of_a_conversation_only_answers_and_their_ends_are_predicted(processor, index):
    examples = SceneExamples("chat", 0, "train", 8)
    item = PreparedDataset(examples, "chat", processor)[index]
    messages = examples[index]["messages"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert predicted_texts(processor, item) == [as_decoded(processor, answer + "<|im_end|>") for answer in answers]
    whole = processor.apply_chat_template(messages).replace("<image>", processor.image_placeholder())
    assert item["input_ids"] == processor.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert item["input_ids"].count(processor.image_token_id) == NUM_CODES


def test_of_a_drawing_no_token_is_predicted_and_the_image_comes_last(processor):
    examples = SceneExamples("drawing", 0, "train", 1)
    item = PreparedDataset(examples, "drawing", processor)[0]
    words = processor.tokenizer(examples[0]["text"], add_special_tokens=False)["input_ids"]
    image = [processor.image_token_id] * NUM_CODES
    assert item["input_ids"] == [*words, processor.image_start_token_id, *image, processor.image_end_token_id]
    assert set(item["labels"]) == {IGNORED}


def test_of_text_alone_everything_is_predicted(processor):
    examples = SceneExamples("text", 0, "train", 1, questions_per_scene=0)
    item = PreparedDataset(examples, "text", processor)[0]
    assert set(item) == {"name", "input_ids", "labels"}
    assert item["labels"] == item["input_ids"]
    assert predicted_texts(processor, item) == [as_decoded(processor, examples[0]["text"] + "<|im_end|>")]


def test_a_conversation_about_a_text_follows_it_without_an_image(processor):
    example = SceneExamples("text", 0, "train", 1, questions_per_scene=2)[0]
    item = PreparedDataset([example], "text", processor)[0]
    expected = example["text"] + "<|im_end|>" + processor.apply_chat_template(example["messages"])
    assert len(example["messages"]) == 4
    assert item["labels"] == item["input_ids"]
    assert item["input_ids"] == processor.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert processor.image_token_id not in item["input_ids"]


def test_of_a_reconstruction_there_are_pixels_only(processor):
    item = PreparedDataset(
        SceneExamples("reconstruction", 0, "train", 1), "reconstruction", processor.image_processor
    )[0]
    expected = np.asarray(scenes_ett.Scenes(0, "train")[0].render()).transpose(2, 0, 1)
    assert set(item) == {"name", "pixel_values"}
    assert np.array_equal(item["pixel_values"][0].numpy(), expected)


def test_a_share_of_prompts_is_left_out_the_same_in_every_epoch(processor):
    examples = SceneExamples("drawing", 0, "train", 40)
    prepared = PreparedDataset(examples, "drawing", processor, prompt_dropout=0.3)
    dropped = [prepared[index]["input_ids"][0] == processor.image_start_token_id for index in range(40)]
    assert 5 <= sum(dropped) <= 20
    assert dropped == [prepared[index]["input_ids"][0] == processor.image_start_token_id for index in range(40)]


def test_a_sequence_beyond_the_limit_is_an_error(processor):
    prepared = PreparedDataset(SceneExamples("caption", 0, "train", 1), "caption", processor, max_length=70)
    with pytest.raises(ValueError, match=r"tokens long, more than data\.max_length=70"):
        prepared[0]


def test_a_word_beyond_the_vocabulary_is_an_error(processor):
    prepared = PreparedDataset([{"images": [], "text": "a quokka"}], "text", processor)
    with pytest.raises(ValueError, match="'quokka' is beyond this model's vocabulary"):
        prepared[0]


# Scenes


@pytest.mark.parametrize("task", ["reconstruction", "text", "caption", "chat", "drawing"])
def test_scene_examples_depend_on_task_seed_split_and_index_alone(task):
    def comparable(example):
        return {**example, "images": [image.tobytes() for image in example["images"]]}

    first, second = SceneExamples(task, 5, "test", 6), SceneExamples(task, 5, "test", 6)
    forwards = [comparable(first[index]) for index in range(6)]
    assert [comparable(second[index]) for index in reversed(range(6))][::-1] == forwards
    assert [comparable(SceneExamples(task, 6, "test", 6)[index]) for index in range(6)] != forwards
    assert len(first) == 6


def test_a_conversation_shows_its_image_once_and_has_the_turns_asked_for():
    examples = SceneExamples("chat", 0, "train", 12, questions_per_scene=3)
    for index in range(12):
        messages = examples[index]["messages"]
        images = [part for message in messages[::2] for part in message["content"] if part["type"] == "image"]
        questions = [message["content"][-1]["text"] for message in messages[::2]]
        assert messages[0]["content"][0] == {"type": "image"} and len(images) == 1
        assert len(questions) == (1 if questions[0] == "Describe the image." else 3)
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(questions)


@pytest.mark.parametrize("independent_turns", [False, True])
def test_a_caption_is_asked_for_where_it_gives_no_answer_away(independent_turns):
    examples = SceneExamples("chat", 0, "train", 40, 3, independent_turns)
    asked = [[m["content"][-1]["text"] for m in examples[index]["messages"][::2]] for index in range(40)]
    described = [questions for questions in asked if questions[-1] == "Describe the image."]
    assert 4 <= len(described) <= 16
    assert {len(questions) for questions in described} == ({4} if independent_turns else {1})


def test_conversations_ask_and_answer_what_the_scene_does():
    """Wording is drawn anew for each conversation; types, answers and slots are the scene's."""
    examples, scenes = SceneExamples("chat", 0, "train", 8), scenes_ett.Scenes(0, "train")
    for index in range(8):
        messages = examples[index]["messages"]
        turns = [
            (question["content"][-1]["text"], answer["content"])
            for question, answer in zip(messages[::2], messages[1::2], strict=True)
        ]
        rng = np.random.default_rng((0, index))
        true = {(question.question, question.answer) for question in scenes_ett.questions(scenes[index], rng)}
        assert set(turns) - true <= {turn for turn in turns if turn[0] == "Describe the image."}


# Folders


@pytest.fixture
def folder(tmp_path):
    """Images of every mode and some sizes, one file that is no image and one that is cut off, with captions."""
    root = tmp_path / "photographs"
    root.mkdir()
    image = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
    image.save(root / "rgb.png")
    image.resize((17, 90)).convert("L").save(root / "grey.png")
    image.convert("RGBA").save(root / "alpha.png")
    image.convert("P").save(root / "palette.gif")
    image.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, 900, dtype=np.uint16).reshape(30, 30)).save(root / "sixteen.png")
    (root / "broken.jpg").write_bytes(b"no image at all")
    whole = (root / "cmyk.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    names = ["rgb.png", "broken.jpg", "grey.png", "alpha.png", "palette.gif", "cmyk.jpg", "cut.jpg", "sixteen.png"]
    lines = [json.dumps({"file_name": name, "text": f"a circle {name[0]}"}) for name in names]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def test_a_folder_gives_its_images_with_captions_whatever_their_mode_and_skips_unreadable_ones(folder, caplog):
    examples = FolderExamples(str(folder), "caption")
    with caplog.at_level(logging.WARNING, logger="ett.data_ett.skipped"):
        read = [examples[index] for index in range(len(examples))]
    assert {image.mode for example in read for image in example["images"]} == {"RGB"}
    assert {len(example["images"]) for example in read} == {1}
    by_caption = {example["text"]: example["images"][0] for example in read}
    assert sorted(text[-1] for text in by_caption) == ["a", "c", "g", "p", "r", "s"]
    assert by_caption["a circle g"].size == (17, 90)
    levels = np.asarray(by_caption["a circle s"])
    assert levels.min() == 0 and levels.max() == 255 and 120 < levels.mean() < 135
    assert sorted(name.rsplit("/")[-1] for name in examples.skipped) == ["broken.jpg", "cut.jpg"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "Skipped example 1",
        "Skipped example 2",
    ]


def test_the_next_readable_image_takes_an_unreadable_ones_place(folder):
    examples = FolderExamples(str(folder), "caption")
    texts = [examples.rows[index]["text"] for index in range(len(examples))]
    broken = next(index for index, text in enumerate(texts) if text == "a circle b")
    assert examples[broken]["text"] in texts[broken + 1 :] + texts[:broken]
    assert len(examples) == 8


def test_a_folder_of_images_goes_all_the_way_to_a_batch(folder, processor):
    metadata = (folder / "metadata.jsonl").read_text()
    for letter in "rbgapcs":
        metadata = metadata.replace(f"circle {letter}", "red circle")
    (folder / "metadata.jsonl").write_text(metadata)
    prepared = PreparedDataset(FolderExamples(str(folder), "caption"), "caption", processor)
    batch = ETTCollator(processor.tokenizer.pad_token_id)([prepared[index] for index in range(8)])
    assert tuple(batch["pixel_values"].shape) == (8, 3, 72, 72)
    assert -1 <= batch["pixel_values"].min() and batch["pixel_values"].max() <= 1
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_images_alone_need_no_metadata(folder):
    (folder / "metadata.jsonl").unlink()
    assert set(FolderExamples(str(folder), "reconstruction")[0]) == {"name", "images"}


def test_captions_without_metadata_are_an_error_that_shows_a_line_of_it(folder):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError) as caught:
        FolderExamples(str(folder), "caption")
    assert "has no column 'text'; its columns are 'image'" in str(caught.value)
    assert '{"file_name": "photo.jpg", "text": "a caption"}' in str(caught.value)


def test_a_wrong_column_is_an_error_that_names_those_there_are(folder):
    with pytest.raises(
        ValueError, match=r"no column 'caption'; its columns are 'image', 'text'\. Name yours with data"
    ):
        FolderExamples(str(folder), "caption", text_column="caption")


def test_a_column_can_be_named(folder):
    metadata = (folder / "metadata.jsonl").read_text().replace('"text"', '"title"')
    (folder / "metadata.jsonl").write_text(metadata)
    assert FolderExamples(str(folder), "caption", text_column="title")[0]["text"].startswith("a circle")


def test_a_folder_of_unreadable_images_is_an_error(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"nothing")
    examples = FolderExamples(str(tmp_path), "reconstruction")
    with pytest.raises(ValueError, match=r"None of the 2 examples of .* can be read"):
        examples[0]


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is empty; expected images and a metadata\.jsonl"):
        FolderExamples(str(tmp_path), "caption")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="could not be read as a dataset"):
        FolderExamples(str(tmp_path / "absent"), "caption")


def test_conversations_of_ones_own_are_read_from_json_lines(tmp_path, processor):
    conversation = [
        {"role": "user", "content": "what color is the circle?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "what shape is red?"},
        {"role": "assistant", "content": "circle"},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": conversation}))
    examples = FolderExamples(str(tmp_path), "chat")
    item = PreparedDataset(examples, "chat", processor)[0]
    assert predicted_texts(processor, item) == ["red <|im_end|>", "circle <|im_end|>"]


# Memory and batches


def test_codes_kept_in_memory_are_those_made_on_the_fly(processor, make_vision_tokenizer):
    vision_tokenizer = make_vision_tokenizer(patch_size=4).eval()
    prepared = PreparedDataset(SceneExamples("caption", 0, "train", 5), "caption", processor)
    in_memory = InMemoryDataset(prepared, vision_tokenizer, batch_size=2)
    assert len(in_memory) == 5
    for index in range(5):
        pixels = to_unit_range(prepared[index]["pixel_values"])
        with torch.no_grad():
            expected = vision_tokenizer.quantize(vision_tokenizer.encode(pixels).latents).codes
        assert torch.equal(in_memory[index]["image_codes"], expected)
        assert "pixel_values" not in in_memory[index]
        assert in_memory[index]["input_ids"] == prepared[index]["input_ids"]


def test_without_a_tokenizer_memory_holds_pixels(processor):
    prepared = PreparedDataset(SceneExamples("caption", 0, "train", 2), "caption", processor)
    in_memory = InMemoryDataset(prepared)
    assert torch.equal(in_memory[1]["pixel_values"], prepared[1]["pixel_values"])


def test_examples_of_several_images_keep_their_codes_together(processor, make_vision_tokenizer):
    images = [scene.render() for scene in scenes_ett.Scenes(0, "train", 3)]
    examples = [{"images": images[:2], "text": "red"}, {"images": images[2:], "text": "blue"}]
    in_memory = InMemoryDataset(
        PreparedDataset(examples, "caption", processor), make_vision_tokenizer(patch_size=4).eval()
    )
    assert [tuple(item["image_codes"].shape) for item in in_memory] == [(2, 9, 9), (1, 9, 9)]


def test_the_collators_example_is_true():
    results = doctest.testmod(ett.data_ett.collator)
    assert results.attempted > 0 and results.failed == 0


def test_a_batch_of_drawings_has_codes_to_predict_and_no_labels():
    codes = torch.arange(4).view(1, 2, 2)
    item = {"input_ids": [7, 8], "labels": [IGNORED, IGNORED], "image_codes": codes}
    batch = ETTCollator(predicts_codes=True)([item, {**item, "image_codes": codes + 4}])
    assert set(batch) == {"input_ids", "attention_mask", "image_codes", "predict_codes"}
    assert batch["image_codes"].flatten().tolist() == list(range(8)) and batch["predict_codes"] is True


def test_pixels_of_a_batch_lie_between_minus_one_and_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    batch = ETTCollator()([{"pixel_values": pixels}])
    assert batch["pixel_values"].flatten().tolist() == pytest.approx([-1, -0.6, 1])
