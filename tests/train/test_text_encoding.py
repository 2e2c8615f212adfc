"""One text, one row of token ids: inference begins as training did, with one BOS, and stops where answers ended."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, GenerationConfig

import ett  # noqa: F401 - makes the Auto classes know ETT
from ett.data_ett import IGNORED
from ett.evaluation_ett.common import image_prompt, tokenize
from ett.processing_ett import ETTProcessor
from ett.train import PreparedDataset
from ett.train.models.building import join
from ett.train.planning.inspection import show
from ett.train.recipes import ModelSection

from .text_tokenizers import ADDS_BOS, ENDS, TOKENIZERS, byte_pairs, words

IMAGE = Image.new("RGB", (16, 16), "red")
TURNS = [
    {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what color is it?"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "is it green?"},
    {"role": "assistant", "content": "a blue square."},
    {"role": "user", "content": "a circle?"},
    {"role": "assistant", "content": "red, green."},
]


def make_processor(name, **kwargs):
    return ETTProcessor.from_parts(TOKENIZERS[name](), 4, image_size=16, **kwargs)


def prepare(processor, task, **example):
    options = {"independent_turns": example.pop("independent_turns", False)}
    options["prompt_dropout"] = example.pop("prompt_dropout", 0.0)
    return PreparedDataset([{"images": [], **example}], task, processor, **options)[0]


def ids_of(features):
    assert len(features["input_ids"]) == 1 and bool(features["attention_mask"].all())
    return features["input_ids"][0].tolist()


def chat_ids(processor, messages, **options):
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **options}
    return ids_of(processor.apply_chat_template(messages, **asked))


def assert_begins(ids, prompt):
    assert len(prompt) < len(ids) and ids[: len(prompt)] == prompt


def assert_one_bos(processor, name, ids):
    bos = processor.tokenizer.convert_tokens_to_ids(ADDS_BOS[name]) if name in ADDS_BOS else None
    assert processor.beginning_ids == ([] if bos is None else [bos])
    if bos is not None:
        assert ids[0] == bos and ids.count(bos) == 1


@pytest.fixture
def make_joined(make_language_model, make_vision_tokenizer):
    """Makes a model of a processor's tokens, as training builds it."""

    def make(processor, **section):
        language_model = make_language_model(vocab_size=len(processor.tokenizer))
        section = ModelSection(image_size=16, **section)
        return join(language_model, make_vision_tokenizer(), processor, section).eval()

    return make


# BOS, and prompts that are prefixes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_a_caption_the_prompt_is_the_same_in_training_and_inference(name):
    processor = make_processor(name)
    item = prepare(processor, "caption", text="a red circle.", images=[IMAGE])
    prompts = [
        ids_of(processor(images=IMAGE)),
        chat_ids(processor, processor.chat_about(IMAGE)),
        ids_of(tokenize(processor, [image_prompt(processor, processor.caption_prompt)])),
    ]
    for prompt in prompts:
        assert_begins(item["input_ids"], prompt)
        assert item["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert item["labels"][len(prompt)] != IGNORED
    assert_one_bos(processor, name, item["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_a_conversation_each_prompt_is_the_same_in_training_and_inference(name):
    processor = make_processor(name)
    item = prepare(processor, "chat", messages=TURNS, images=[IMAGE])
    for asked in (1, 3, 5):
        prompt = chat_ids(processor, TURNS[:asked])
        assert_begins(item["input_ids"], prompt)
        assert item["labels"][len(prompt) - 1] == IGNORED != item["labels"][len(prompt)]
    assert_one_bos(processor, name, item["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_independent_turns_each_prompt_is_the_same_in_training_and_inference(name):
    processor = make_processor(name)
    item = prepare(processor, "chat", messages=TURNS, images=[IMAGE], independent_turns=True)
    for number, turn in enumerate(TURNS[::2], 1):
        text = turn["content"] if isinstance(turn["content"], str) else turn["content"][1]["text"]
        numbered = zip(item["input_ids"], item["branches"], strict=True)
        own = [token for token, branch in numbered if branch in (0, number)]
        assert_begins(own, chat_ids(processor, processor.chat_about(IMAGE, text)))
        assert_one_bos(processor, name, own)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_a_drawing_the_prompt_is_the_same_in_training_and_inference(name):
    processor = make_processor(name)
    item = prepare(processor, "drawing", text="a red circle", images=[IMAGE])
    assert_begins(item["input_ids"], ids_of(processor.prepare_drawing("a red circle")))
    assert_one_bos(processor, name, item["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_empty_prompt_of_guidance_is_that_of_training(make_joined, monkeypatch, name):
    processor = make_processor(name)
    item = prepare(processor, "drawing", text="a red circle", images=[IMAGE], prompt_dropout=1.0)
    model, seen = make_joined(processor, visual_head=True), []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    inputs = processor.prepare_drawing(["a red circle", "a"])
    model.generate(**inputs, generation_mode="image", guidance_scale=2.0, image_size=(4, 4))
    empty = seen[0]["input_ids"][-1][seen[0]["attention_mask"][-1].bool()].tolist()
    assert empty == [*processor.beginning_ids, processor.image_start_token_id]
    assert_begins(item["input_ids"], empty)
    assert_one_bos(processor, name, item["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_text_alone_the_beginning_is_the_same_in_training_and_inference(name):
    processor = make_processor(name)
    item = prepare(processor, "text", text="a red circle is a circle.")
    assert_begins(item["input_ids"], ids_of(processor(text="a red circle")))
    assert_one_bos(processor, name, item["input_ids"])
    count = len(processor.beginning_ids)
    assert item["labels"] == [IGNORED] * count + item["input_ids"][count:]


def test_a_conversation_after_a_text_has_no_bos_of_its_own():
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    processor = make_processor("llama 3", chat_template=template)
    item = prepare(processor, "text", text="a circle.", messages=[{"role": "user", "content": "red?"}])
    assert_one_bos(processor, "llama 3", item["input_ids"])


@pytest.mark.parametrize("name", ADDS_BOS)
def test_a_template_that_writes_bos_has_one_too(name):
    processor = make_processor(name)
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    item = prepare(processor, "chat", messages=TURNS, images=[IMAGE])
    for asked in (1, 3, 5):
        assert_begins(item["input_ids"], chat_ids(processor, TURNS[:asked]))
    assert_one_bos(processor, name, item["input_ids"])
    caption = prepare(processor, "caption", text="a red circle.", images=[IMAGE])
    prompt = image_prompt(processor, processor.caption_prompt)
    assert_begins(caption["input_ids"], ids_of(tokenize(processor, [prompt])))
    assert_begins(caption["input_ids"], ids_of(processor(images=IMAGE)))


@pytest.mark.parametrize("name", ADDS_BOS)
def test_inspection_shows_one_bos_that_is_not_predicted(name):
    processor = make_processor(name)
    item = prepare(processor, "chat", messages=TURNS, images=[IMAGE])
    pieces = show(item, processor).pieces
    assert not pieces[0].is_predicted
    assert "".join(piece.text for piece in pieces).count(ADDS_BOS[name]) == 1


def test_a_tokenizer_that_also_ends_texts_gives_prompts_without_their_end():
    from tokenizers import processors

    tokenizer = TOKENIZERS["llama 3"]()
    names = ("<|begin_of_text|>", "<|eot_id|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=[(n, tokenizer.convert_tokens_to_ids(n)) for n in names]
    )
    processor = ETTProcessor.from_parts(tokenizer, 4, image_size=16)
    bos, end = tokenizer.convert_tokens_to_ids(names)
    ids = ids_of(processor.prepare_drawing("a circle"))
    assert ids[0] == bos and ids[-1] == processor.image_start_token_id and end not in ids


def test_prompts_of_a_batch_begin_alike_and_are_padded_before_bos():
    processor = make_processor("llama 3")
    features = processor(text=["a red circle", "a"])
    first, second = features["input_ids"].tolist()
    bos, pad = processor.beginning_ids[0], processor.tokenizer.pad_token_id
    assert first[0] == bos and second.count(bos) == 1 and second[: second.index(bos)] == [pad] * second.index(bos)
    assert features["attention_mask"][1].tolist() == [int(token != pad) for token in second]


def test_without_special_tokens_on_request():
    processor = make_processor("llama 3")
    ids = ids_of(processor(text="a circle", add_special_tokens=False))
    assert ids == processor.tokenizer("a circle", add_special_tokens=False)["input_ids"]


# What ends an answer


@pytest.mark.parametrize("name", TOKENIZERS)
def test_generation_stops_at_the_token_that_ends_answers_in_training(make_joined, tmp_path, name):
    processor = make_processor(name)
    end = processor.tokenizer.convert_tokens_to_ids(ENDS[name])
    for item in (
        prepare(processor, "caption", text="a red circle.", images=[IMAGE]),
        prepare(processor, "chat", messages=TURNS, images=[IMAGE]),
        prepare(processor, "text", text="a red circle."),
    ):
        learned = [label for label in item["labels"] if label != IGNORED]
        assert learned[-1] == end and processor.tokenizer.eos_token_id == end
    assert sum(label == end for label in prepare(processor, "chat", messages=TURNS, images=[IMAGE])["labels"]) == 3
    model = make_joined(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == end
    assert model.config.text_config.eos_token_id == end
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.eos_token_id == end
    assert loaded.post_process_image_text_to_text(torch.tensor([[end]])) == [""]


def test_an_answer_ends_with_the_token_of_a_template_of_ones_own():
    template = (
        "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
    )
    processor = make_processor("gemma 3", chat_template=template)
    assert processor.end_token == "<end_of_turn>"
    item = prepare(processor, "chat", messages=TURNS[2:4])
    assert [label for label in item["labels"] if label != IGNORED][-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_mask_of_the_assistants_tokens_is_what_training_predicts(name):
    processor = make_processor(name)
    item = prepare(processor, "chat", messages=TURNS, images=[IMAGE])
    features = processor.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert features["input_ids"][0].tolist() == item["input_ids"]
    assert torch.as_tensor(features["assistant_masks"])[0].tolist() == [
        int(label != IGNORED) for label in item["labels"]
    ]


# Padding


@pytest.mark.parametrize("name", TOKENIZERS)
def test_there_is_a_padding_token_in_the_folder_and_in_the_model(make_joined, tmp_path, name):
    processor = make_processor(name)
    pad = processor.tokenizer.pad_token_id
    assert pad is not None
    model = make_joined(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.pad_token_id == pad
    assert GenerationConfig.from_pretrained(tmp_path).pad_token_id == pad == model.config.text_config.pad_token_id
    assert loaded(text=["a red circle", "a"])["input_ids"][1, 0] == pad


@pytest.mark.parametrize(
    ("name", "pad"), [("llama 2", "<unk>"), ("gpt 2", "<|endoftext|>"), ("smollm 2 base", "<|endoftext|>")]
)
def test_padding_is_chosen_among_the_tokens_that_there_are(name, pad):
    assert make_processor(name).tokenizer.pad_token == pad


def test_a_token_that_is_padding_too_learns(make_joined):
    processor = make_processor("llama 3")
    end = processor.tokenizer.eos_token_id
    assert processor.tokenizer.pad_token_id == end
    model = make_joined(processor)
    model = type(model)(model.config)
    model(input_ids=torch.tensor([[10, end, 11]]), labels=torch.tensor([[-100, -100, 11]])).loss.backward()
    assert model.get_input_embeddings().weight.grad[end].abs().sum() > 0


def test_one_prompt_needs_no_padding_token():
    processor = make_processor("gpt 2")
    processor.tokenizer.pad_token = None
    assert ids_of(processor(text="a red circle"))
    assert len(processor(text=["a", "b"])["input_ids"]) == 2
    with pytest.raises(ValueError, match=r"^The texts differ in length, and the tokenizer has no padding token; set"):
        processor(text=["a red circle", "a"])


@pytest.mark.parametrize("task", ["caption", "chat", "text"])
@pytest.mark.parametrize("make", [words, byte_pairs])
def test_without_a_token_that_ends_texts_training_says_so_before_it_reads_an_example(make, task):
    processor = ETTProcessor.from_parts(make(), 4, image_size=16)
    assert ids_of(processor(images=IMAGE))
    with pytest.raises(ValueError, match=r"^The tokenizer has no token that ends a text, so a model could not learn"):
        PreparedDataset([], task, processor)
    PreparedDataset([], "drawing", processor)
