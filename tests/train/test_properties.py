"""What holds for every recipe, adapter, conversation and prompt."""

import dataclasses
import json
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Union, get_args, get_origin

import datasets
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from ett.data_ett.captions import caption_text
from ett.data_ett.conversations import read_conversation
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.processing_ett import ETTProcessor
from ett.train import ETTTrainingArguments, FolderExamples, available_recipes, load_recipe
from ett.train.field_types import CHOICES, RANGES, field_hints
from ett.train.models.adapters import merge_folder
from ett.train.recipes import TRAINING_FIELDS, DataSection, LoraSection, ModelSection

from .test_adapters import MAPS, shaken
from .test_text_encoding import IMAGE, assert_begins, assert_one_bos, chat_ids, ids_of, make_processor, prepare
from .text_tokenizers import TOKENIZERS, WORDS
from .trainers import changed

# Recipes

SECTIONS = {"model": ModelSection, "data": DataSection, "lora": LoraSection, "training": ETTTrainingArguments}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORDS_THAT_LOOK_LIKE_VALUES = st.sampled_from(["2024-05-06", "12:30:00", "007", "1e5", "true", "null", "NaN", "~"])
TEXTS |= WORDS_THAT_LOOK_LIKE_VALUES
SCALARS = st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(-1e6, 1e6) | TEXTS

FIELDS = {
    f"{section}.{name}": CHOICES.get(f"{section}.{name}", hint)
    for section, section_class in SECTIONS.items()
    for name, hint in field_hints(section_class).items()
    if section != "training" or name in TRAINING_FIELDS
} | {"title": str, "task": str, "train": list[str]}
"""Types of a recipe's fields."""

OWN_RANGES = {
    "lora.rank": lambda value: value > 0,
    "lora.alpha": lambda value: value > 0,
    "lora.dropout": RANGES["training.adam_beta1"][1],
}
OTHERWISE = {
    "data.mixture": st.none()
    | st.dictionaries(TEXTS, st.fixed_dictionaries({}, optional={"weight": st.floats(1e-3, 1e3), "source": TEXTS})),
}


def alternatives(annotation: Any) -> Iterator[Any]:
    """The types of a union; beside an enumeration text is none."""
    if get_origin(annotation) in (Union, types.UnionType):
        arguments = get_args(annotation)
        has_choices = any(isinstance(argument, type) and issubclass(argument, Enum) for argument in arguments)
        for argument in arguments:
            if not (has_choices and argument is str):
                yield from alternatives(argument)
    else:
        yield annotation


def values_of(path: str, annotation: Any) -> st.SearchStrategy:
    """Values that a field takes."""
    if path in OTHERWISE:
        return OTHERWISE[path]
    return st.one_of(*(values_of_one(path, kind) for kind in alternatives(annotation)))


def values_of_one(path: str, kind: Any) -> st.SearchStrategy:
    is_fit = OWN_RANGES.get(path) or RANGES.get(path, (None, lambda value: True))[1]
    arguments, kind = get_args(kind), get_origin(kind) or kind
    if kind is Literal:
        return st.sampled_from(arguments)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from([member.value for member in kind])
    if kind in (list, tuple):
        return st.lists(values_of("", arguments[0]) if arguments else SCALARS, max_size=3)
    if kind is dict:
        return st.dictionaries(TEXTS, values_of(path, arguments[1]) if arguments else SCALARS, max_size=3)
    return {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(-1, 10**6).filter(is_fit),
        float: (st.floats(0, 1) | st.floats(-1e6, 1e6) | st.integers(0, 10**6)).filter(is_fit),
        str: TEXTS,
    }.get(kind, SCALARS)


def override(path: str, value: Any) -> str:
    return f"{path}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}".removesuffix("\n...\n")


@st.composite
def overrides(draw) -> dict[str, Any]:
    paths = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=6))
    return {path: draw(values_of(path, FIELDS[path]), label=path) for path in paths}


def field_of(recipe: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        recipe = recipe[name]
    return recipe


@settings(max_examples=60)
@given(name=st.sampled_from(available_recipes()), changes=overrides())
def test_a_recipe_has_what_overrides_say_and_survives_being_written_and_read(name, changes):
    recipe = dataclasses.asdict(load_recipe(name, [override(*change) for change in changes.items()]))
    for path, value in changes.items():
        # Options that transformers hands on become numbers where they look like some.
        if not isinstance(value, dict):
            assert field_of(recipe, path) == value
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        assert dataclasses.asdict(load_recipe(str(path))) == recipe


def wrong_values(annotation: Any) -> list[Any]:
    kinds = [get_origin(kind) or kind for kind in alternatives(annotation)]
    wrong = {dict: {"a": [[1]]}, list: [[1]], bool: True, str: "neither", float: 0.5}
    return [] if Any in kinds else [value for kind, value in wrong.items() if kind not in kinds]


WRONG = [(path, value) for path, annotation in FIELDS.items() for value in wrong_values(annotation)]
WRONG += [(section, value) for section in SECTIONS for value in (3, "neither", [1], True)]


@settings(max_examples=100)
@given(
    name=st.sampled_from(available_recipes()),
    wrong=st.sampled_from(WRONG),
    others=st.lists(st.sampled_from(["train=[projector]", "title=x", "task=chat"]), unique=True),
)
@example(name="stage2_semantic", wrong=("training", 3), others=["train=[projector]"])
def test_a_value_of_a_wrong_type_is_one_sentence_that_names_its_field(name, wrong, others):
    path, value = wrong
    others = [other for other in others if not other.startswith(f"{path}=")]
    with pytest.raises(ValueError) as caught:
        load_recipe(name, [override(path, value), *others])
    told = str(caught.value)
    assert path in told and repr(value) in told and ("; expected " in told or "; it is a " in told)
    assert told.endswith(".") and "\n" not in told


@given(section=st.sampled_from([*SECTIONS, "", "data.mixture.a"]), key=SCALARS, value=SCALARS)
def test_an_unknown_field_is_named_whatever_yaml_made_of_its_name(section, key, value):
    recipe: dict[Any, Any] = {key: value}
    for name in reversed(section.split(".") if section else []):
        recipe = {name: recipe}
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe))
        with pytest.raises(ValueError) as caught:
            load_recipe(str(path))
    prefix = f"{section}." if section else ""
    assert str(caught.value).startswith(f"The recipe has an unknown field '{prefix}{key}'. ")


# Adapters


@st.composite
def adapters(draw) -> LoraConfig:
    names = draw(st.lists(st.sampled_from(sorted(MAPS)), unique=True, min_size=1, max_size=3))
    pattern = rf"model\.language_model\..*\.({'|'.join(names)})"
    beyond = st.sampled_from([[], ["lm_head"], ["embed_tokens"], ["linear_1"]])
    targets = draw(beyond.map(lambda others: names + others) | st.sampled_from([pattern, "all-linear"]))
    # One key for a map: peft writes keys in alphabetical order, and takes the first that fits.
    keys = st.lists(st.sampled_from(names), unique=True).flatmap(
        lambda chosen: st.tuples(*(st.sampled_from([name, rf"layers\.1\..*\.{name}"]) for name in chosen))
    )
    wraps = not {"lm_head", "linear_1"} & {*targets} and targets != "all-linear"
    return LoraConfig(
        r=draw(st.integers(1, 8)),
        lora_alpha=draw(st.integers(1, 64) | st.floats(0.5, 64)),
        target_modules=targets,
        layers_to_transform=[1] if targets == names and draw(st.booleans()) else None,
        use_rslora=draw(st.booleans()),
        use_dora="embed_tokens" not in targets and draw(st.booleans()),
        rank_pattern={key: draw(st.integers(1, 8)) for key in draw(keys)},
        alpha_pattern={key: draw(st.integers(1, 64)) for key in draw(keys)},
        bias=draw(st.sampled_from(["none", "lora_only", "all"])),
        modules_to_save=draw(st.sampled_from([None, ["projector"], ["lm_head"]])) if wraps else None,
    )


@settings(max_examples=8)
@given(config=adapters())
def test_merge_gives_what_peft_merges(base, config):
    with TemporaryDirectory() as folder:
        start = ETTForConditionalGeneration.from_pretrained(base)
        shaken(get_peft_model(start, config)).save_pretrained(f"{folder}/adapter")
        model = PeftModel.from_pretrained(ETTForConditionalGeneration.from_pretrained(base), f"{folder}/adapter")
        merge_folder(str(base), f"{folder}/adapter", f"{folder}/out")
        found = ETTForConditionalGeneration.from_pretrained(f"{folder}/out").state_dict()
    expected = model.merge_and_unload().state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert changed(expected, ETTForConditionalGeneration.from_pretrained(base))


# Conversations and prompts

ROLES = ("user", "assistant")
SNIPPETS = (
    "assistant: ",
    "user: ",
    "\n",
    " ",
    "  ",
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "é",
    "猫",
    "e\u0301",
    "🐈",
)


def sentences(name: str | None, **options) -> st.SearchStrategy[str]:
    """Texts for a tokenizer; without a name, any text."""
    if name is not None and name.startswith("words"):
        return st.lists(st.sampled_from(WORDS), **{"min_size": 1, "max_size": 6, **options}).map(" ".join)
    pieces = st.sampled_from(SNIPPETS) | st.text(
        st.characters(max_codepoint=127, min_codepoint=32), min_size=1, max_size=6
    )
    return st.lists(pieces, **{"max_size": 6, **options}).map("".join).filter(lambda text: "<image" not in text)


@st.composite
def conversations(draw, name: str | None = None) -> list[dict[str, Any]]:
    """A conversation with typed content, whose last turn is an answer."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(sentences(name))})
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.just({"type": "image"}) | sentences(name, min_size=1), min_size=1, max_size=3))
        content = []
        for part in parts:
            if not isinstance(part, str):
                content.append(part)
            elif part and (not content or content[-1]["type"] == "image"):
                content.append({"type": "text", "text": part})
        if not any(part["type"] == "image" for part in content):
            content = "".join(part["text"] for part in content)
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": draw(sentences(name, min_size=1))},
        ]
    return messages


def count_images(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"])


def with_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def fill(content):
        return (
            content
            if isinstance(content, str)
            else [{**p, "image": IMAGE} if p["type"] == "image" else p for p in content]
        )

    return [{**message, "content": fill(message["content"])} for message in messages]


PROCESSORS: dict[str, ETTProcessor] = {}


def processor_of(name: str) -> ETTProcessor:
    if name not in PROCESSORS:
        PROCESSORS[name] = make_processor(name)
    return PROCESSORS[name]


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(TOKENIZERS)), data=st.data())
def test_every_prompt_of_a_conversation_begins_its_training_ids(name, data):
    processor, messages = processor_of(name), data.draw(conversations(name))
    images = [IMAGE] * count_images(messages)
    item = prepare(processor, "chat", messages=messages, images=images)
    assert_one_bos(processor, name, item["input_ids"])
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = chat_ids(processor, with_images(messages[:number]))
            assert_begins(item["input_ids"], prompt)
            assert item["labels"][len(prompt) - 1] == -100 != item["labels"][len(prompt)]


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(TOKENIZERS)), data=st.data())
def test_every_prompt_of_a_caption_or_an_image_begins_its_training_ids(name, data):
    processor, text = processor_of(name), data.draw(sentences(name).filter(str.strip))
    caption = prepare(processor, "caption", text=text, images=[IMAGE])
    assert_begins(caption["input_ids"], ids_of(processor(images=IMAGE)))
    drawing = prepare(processor, "drawing", text=text, images=[IMAGE])
    assert_begins(drawing["input_ids"], ids_of(processor.prepare_drawing(text)))
    for item in (caption, drawing, prepare(processor, "text", text=text)):
        assert_one_bos(processor, name, item["input_ids"])


# Rows


def as_text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join("\n<image>\n" if part["type"] == "image" else part["text"] for part in content)


FORMS = {
    "llava": lambda ms: [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": as_text(m["content"])}
        for m in ms
    ],
    "texts": lambda ms: [{"role": m["role"], "content": as_text(m["content"])} for m in ms],
    "parts": lambda ms: [
        {
            "role": m["role"],
            "content": m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}],
        }
        for m in ms
    ],
    "json": lambda ms: json.dumps(ms),
}


@settings(max_examples=60)
@given(messages=conversations(), form=st.sampled_from(sorted(FORMS)))
def test_a_conversation_is_the_same_in_every_form(messages, form):
    assert read_conversation(FORMS[form](messages), count_images(messages)) == messages


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


@given(
    conversations=st.lists(conversations(), min_size=1, max_size=4),
    form=st.sampled_from(sorted(FORMS)),
    suffix=st.sampled_from(["jsonl", "json", "parquet"]),
)
def test_the_conversations_of_a_file_are_those_that_were_written(conversations, form, suffix):
    with TemporaryDirectory() as folder:
        Image.new("RGB", (4, 4)).save(Path(folder, "a.png"))
        rows = [{"images": ["a.png"] * count_images(own), "messages": FORMS[form](own)} for own in conversations]
        examples = FolderExamples(write_rows(Path(folder, f"rows.{suffix}"), rows), "chat")
        for index, messages in enumerate(conversations):
            assert examples[index]["messages"] == messages
            assert len(examples[index]["images"]) == count_images(messages)


@given(
    cells=st.lists(
        TEXTS | st.integers(-(2**53), 2**53) | st.just(2.5) | st.none() | st.lists(TEXTS, max_size=2),
        min_size=1,
        max_size=6,
    ),
    suffix=st.sampled_from(["jsonl", "json"]),
)
def test_captions_of_a_file_are_those_that_were_written_and_blank_ones_are_skipped(cells, suffix):
    with TemporaryDirectory() as folder:
        rows = []
        for number, cell in enumerate(cells):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(Path(folder, f"{number}.png"))
            rows.append({"image": f"{number}.png", "text": cell})
        path = write_rows(Path(folder, f"rows.{suffix}"), rows)
        expected = [
            {text for text in map(caption_text, cell if isinstance(cell, list) else [cell]) if text and text.strip()}
            for cell in cells
        ]
        if not any(expected):
            with pytest.raises(ValueError, match=r"can be used; the first, 0\.png: Its 'text' is "):
                FolderExamples(path, "caption")
            return
        examples = FolderExamples(path, "caption")
        found = [examples[index] for index in range(len(cells))]
        assert all(example["text"] in expected[example["images"][0].getpixel((0, 0))[0]] for example in found)
        assert set(examples.skipped) == {f"{number}.png" for number, texts in enumerate(expected) if not texts}
