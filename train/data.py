"""What the stages learn from: the embedded scenes or the user's own pictures, as token ids, labels and pixels.

- An *example* is a dict: `images` (a list of pictures) and, by task, `text` or `messages`.
- A task says how an example becomes a sequence, and which of its tokens are predicted.
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

import scenes_ett
from processing_ett import CAPTION_PROMPT, ETTImageProcessor, ETTProcessor, ImageError, load_image

logger = logging.getLogger(__name__)

IGNORED = -100
QUESTION_ORDER = (
    *("position", "colour", "shape", "position", "count"),
    *("colour", "reading", "position", "relation", "shape"),
)
"""In which order a scene is asked about, as far as it has such questions. Where a thing is comes most often: to search
the picture is learned last."""
Segments = list[tuple[str, bool]]


# Tasks: an example to pieces of text, each marked as predicted or not. Placeholders stand for pictures.


def text_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """Text alone, all of it predicted; a conversation about it follows where there is one."""
    text = example["text"] + processor.tokenizer.eos_token
    if "messages" in example:
        text += processor.apply_chat_template(example["messages"])
    return [(text, True)]


def caption_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """A picture and its caption, which is predicted (equation 2), as the answer to the processor's `caption_prompt`:
    so a model describes pictures when asked to from the first stage on."""
    request = [{"type": "image"}] * len(example["images"]) + [{"type": "text", "text": processor.caption_prompt}]
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": example["text"]}]
    return chat_segments({"messages": messages}, processor)


def chat_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """A conversation in the chat template; the assistant's turns are predicted, with the token that ends them."""
    messages, end = example["messages"], processor.tokenizer.eos_token
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    before = processor.apply_chat_template([messages[:index] for index in turns], add_generation_prompt=True)
    after = processor.apply_chat_template([messages[: index + 1] for index in turns])
    segments: Segments = []
    done = ""
    for asked, answered in zip(before, after, strict=True):
        answer = answered[len(asked) :]
        kept = answer.rfind(end) + len(end) if end in answer else len(answer)
        segments += [(asked[len(done) :], False), (answer[:kept], True), (answer[kept:], False)]
        done = answered
    return segments


def drawing_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """A prompt, then the picture, whose codes are predicted."""
    return [(example["text"] + processor.image_token, False)]


def no_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """Pictures alone."""
    return []


TASKS: dict[str, Callable[[dict[str, Any], ETTProcessor], Segments]] = {
    "reconstruction": no_segments,
    "text": text_segments,
    "caption": caption_segments,
    "chat": chat_segments,
    "drawing": drawing_segments,
}


# Sources: where examples come from.


class SceneExamples(Dataset):
    """Examples drawn on the fly from scenes, the same for the same task, seed, split and index.

    Args:
        questions_per_scene (`int`): Questions in a conversation, and in what follows a text.
    """

    def __init__(self, task: str, seed: int, split: str, length: int, questions_per_scene: int = 6):
        self.task, self.seed, self.split, self.length = task, seed, split, length
        self.questions_per_scene = questions_per_scene
        self.scenes = scenes_ett.Scenes(seed, split)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        scene = self.scenes[index]
        if self.task == "drawing":
            # Captions say where everything stands, which teaches to follow a prompt sooner than prompts alone.
            if rng.random() < 0.5 and scene.text is None:
                return {"images": [scene.render()], "text": scenes_ett.caption(scene, rng)}
            prompt, scene = scenes_ett.drawing_pair(self.seed, self.split, index)
            return {"images": [scene.render()], "text": prompt.text}
        example = {"images": [] if self.task == "text" else [scene.render()]}
        if self.task in ("text", "caption"):
            example["text"] = scenes_ett.caption(scene, rng)
        if self.task in ("text", "chat") and self.questions_per_scene:
            example["messages"] = self._conversation(scene, rng)
        return example

    def _conversation(self, scene: scenes_ett.Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Questions and answers; about every fourth picture only a request for a caption, which would give the answers
        away."""
        questions = scenes_ett.questions(scene, rng)
        if self.task == "chat" and rng.random() < 0.25:
            return _turns([(CAPTION_PROMPT, scenes_ett.caption(scene, rng))], with_image=True)
        by_type = {kind: [q for q in questions if q.type == kind] for kind in scenes_ett.QUESTION_TYPES}
        turns = []
        for kind in itertools.cycle(QUESTION_ORDER):
            if len(turns) == self.questions_per_scene or not any(by_type.values()):
                break
            if left := by_type[kind]:
                question = left.pop(rng.integers(len(left)))
                turns.append((question.question, question.answer))
        return _turns(turns, with_image=self.task == "chat")


def _turns(questions: list[tuple[str, str]], with_image: bool) -> list[dict[str, Any]]:
    messages = []
    for question, answer in questions:
        content = [{"type": "text", "text": question}]
        if with_image and not messages:
            content.insert(0, {"type": "image"})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def independent_conversations(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each pair of turns as a conversation of its own, with the first turn's pictures; a system's turn stays in all.

    Raises:
        ValueError: Turns of user and assistant do not alternate.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    asked, answered = turns[::2], turns[1::2]
    if [turn["role"] for turn in turns] != ["user", "assistant"] * len(answered) or not answered:
        raise ValueError(
            "independent_turns needs conversations in which user and assistant alternate, the user first; one has the "
            f"roles {', '.join(turn['role'] for turn in turns) or 'none'}."
        )
    first = asked[0]["content"]
    pictures = [part for part in first if part["type"] == "image"] if isinstance(first, list) else []
    conversations = []
    for question, answer in zip(asked, answered, strict=True):
        content = question["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part for part in content if part["type"] != "image"]
        conversations.append([*system, {"role": "user", "content": [*pictures, *texts]}, answer])
    return conversations


class FolderExamples(Dataset):
    """Examples of the user's own: a folder of pictures with `metadata.jsonl` (the imagefolder convention of datasets),
    or any data set that [`datasets.load_dataset`] takes.

    A picture that cannot be read is skipped, named and counted: the next readable one takes its place.

    Args:
        path (`str`): Folder, file or name on the Hub.
        text_column (`str`): Column of captions or prompts; not read for reconstruction or chat.
        messages_column (`str`): Column of conversations, lists of `role` and `content`.

    Raises:
        ValueError: There is nothing to learn from, or a column is missing.
    """

    def __init__(
        self,
        path: str,
        task: str,
        split: str = "train",
        image_column: str = "image",
        text_column: str = "text",
        messages_column: str = "messages",
    ):
        self.path, self.task = path, task
        self.image_column, self.text_column, self.messages_column = image_column, text_column, messages_column
        self.rows = self._load(split)
        self.skipped: dict[str, str] = {}
        if image_column in self.rows.column_names:
            self.rows = self.rows.cast_column(image_column, datasets.Image(decode=False))

    def _load(self, split: str) -> datasets.Dataset:
        folder = Path(self.path)
        if folder.is_dir() and not any(path.is_file() for path in folder.rglob("*")):
            raise ValueError(f"The folder '{self.path}' is empty; expected pictures and a metadata.jsonl.")
        try:
            rows = datasets.load_dataset(self.path, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            raise ValueError(f"'{self.path}' could not be read as a data set: {cause}") from error
        needed = {"reconstruction": (self.image_column,), "text": (self.text_column,)}
        needed |= {"caption": (self.image_column, self.text_column), "drawing": (self.image_column, self.text_column)}
        needed |= {"chat": (self.messages_column,)}
        missing = [column for column in needed[self.task] if column not in rows.column_names]
        if missing:
            hint = ""
            if folder.is_dir() and not list(folder.rglob("metadata.*")):
                hint = " The folder has no metadata.jsonl with a line such as " + (
                    '{"file_name": "photo.jpg", "text": "a caption"} for each picture.'
                )
            raise ValueError(
                f"'{self.path}' has no column {', '.join(map(repr, missing))}; its columns are "
                f"{', '.join(map(repr, rows.column_names)) or 'none'}. Name yours with data.image_column, "
                f"data.text_column or data.messages_column.{hint}"
            )
        if not len(rows):
            raise ValueError(f"'{self.path}' holds no examples.")
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            row = self.rows[(index + offset) % len(self)]
            try:
                return self._example(row)
            except ImageError as error:
                name = str(row[self.image_column].get("path") or f"row {(index + offset) % len(self)}")
                if name not in self.skipped:
                    self.skipped[name] = str(error)
                    logger.warning("Skipped picture %d: %s (%s)", len(self.skipped), name, error)
        raise ValueError(f"None of the {len(self)} pictures of '{self.path}' can be read.")

    def _example(self, row: dict[str, Any]) -> dict[str, Any]:
        values = row.get(self.image_column) if self.task != "text" else None
        values = values if isinstance(values, list) else [values] if values is not None else []
        example: dict[str, Any] = {"images": [load_image(value["bytes"] or value["path"]) for value in values]}
        if self.task == "chat":
            example["messages"] = row[self.messages_column]
        elif self.task != "reconstruction":
            example["text"] = row[self.text_column]
            if not isinstance(example["text"], str):
                raise ValueError(
                    f"'{self.path}' has an example whose {self.text_column!r} is {example['text']!r}; expected text."
                )
        return example


# Preparation: examples to numbers.


class PreparedDataset(Dataset):
    """Examples as the collator takes them: `input_ids` and `labels` (lists of `int`) and `pixel_values`
    `(num_images, 3, H, W)` of uint8, which the collator maps to `[-1, 1]`.

    Args:
        examples (`Dataset`): [`SceneExamples`] or [`FolderExamples`].
        processor ([`ETTProcessor`], or [`ETTImageProcessor`] for reconstruction).
        prompt_dropout (`float`): Share of examples whose text is left out, for guidance (drawing).
        max_length (`int`): Longer sequences are an error: cutting one would tear a picture or an answer apart.
        independent_turns (`bool`): Each turn of a conversation is asked as if it were the first: turns share the
            picture before them and see nothing of one another, so that no answer gives another away. Items then also
            hold `branches`, 0 for what is shared and the turn's number for the rest of the tokens.
    """

    def __init__(
        self,
        examples: Dataset,
        task: str,
        processor: ETTProcessor | ETTImageProcessor,
        seed: int = 0,
        prompt_dropout: float = 0.0,
        max_length: int = 4096,
        independent_turns: bool = False,
    ):
        self.examples, self.task, self.processor = examples, task, processor
        self.seed, self.prompt_dropout, self.max_length = seed, prompt_dropout, max_length
        self.independent_turns = independent_turns and task == "chat"
        if task != "reconstruction":
            placeholder = processor.image_placeholder()
            self.picture_ids = processor.tokenizer(placeholder, add_special_tokens=False)["input_ids"]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        if self.prompt_dropout and np.random.default_rng((self.seed, index)).random() < self.prompt_dropout:
            example = {**example, "text": ""}
        prepared: dict[str, Any] = {}
        if self.task != "reconstruction":
            prepared |= self._branches(example) if self.independent_turns else self._tokens(example)
            self._check_length(prepared)
        if example["images"]:
            image_processor = getattr(self.processor, "image_processor", self.processor)
            pixels = image_processor(example["images"], return_tensors="pt")["pixel_values"]
            prepared["pixel_values"] = ((pixels + 1) * 127.5).round().to(torch.uint8)
        return prepared

    def _tokens(self, example: dict[str, Any]) -> dict[str, list[int]]:
        return self._join(TASKS[self.task](example, self.processor), example)

    def _branches(self, example: dict[str, Any]) -> dict[str, list[int]]:
        """The example's turns as branches of one sequence, behind what all of them begin with."""
        turns = [
            self._join(TASKS[self.task]({"messages": messages}, self.processor), example)
            for messages in independent_conversations(example["messages"])
        ]
        # A branch's first token has nothing of its own before it, so it must not be a predicted one.
        asked = [list(itertools.takewhile(lambda label: label == IGNORED, turn["labels"])) for turn in turns]
        columns = zip(*(turn["input_ids"][: min(map(len, asked)) - 1] for turn in turns), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        joined = {name: turns[0][name][:shared] for name in ("input_ids", "labels")}
        branches = [0] * shared
        for number, turn in enumerate(turns, 1):
            for name, values in joined.items():
                values += turn[name][shared:]
            branches += [number] * (len(turn["input_ids"]) - shared)
        return {**joined, "branches": branches}

    def _join(self, segments: Segments, example: dict[str, Any]) -> dict[str, list[int]]:
        """Segments to one sequence, each picture's placeholder to one for each of its codes."""
        input_ids, labels = [], []
        texts, predicted = zip(*segments, strict=True)
        self.processor.check_vocabulary("\n".join(texts))
        placeholders = sum(text.count(self.processor.image_token) for text in texts)
        if placeholders != len(example["images"]):
            raise ValueError(
                f"An example has {len(example['images'])} pictures and {placeholders} placeholders "
                f"{self.processor.image_token} in its text; give one placeholder for each."
            )
        encoded = self.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for ids, is_predicted in zip(encoded, predicted, strict=True):
            expanded = []
            for token in ids:
                expanded += self.picture_ids if token == self.processor.image_token_id else [token]
            input_ids += expanded
            labels += expanded if is_predicted else [IGNORED] * len(expanded)
        return {"input_ids": input_ids, "labels": labels}

    def _check_length(self, prepared: dict[str, list[int]]):
        if len(prepared["input_ids"]) > self.max_length:
            raise ValueError(
                f"An example is {len(prepared['input_ids'])} tokens long, more than "
                f"data.max_length={self.max_length}; shorten it or raise the limit."
            )


class InMemoryDataset(Dataset):
    """Every example of a prepared data set, prepared once. With a frozen tokenizer, pictures are kept as `image_codes`
    `(num_images, h, w)`, since a frozen tokenizer always gives the same codes."""

    def __init__(
        self,
        prepared: PreparedDataset,
        vision_tokenizer: torch.nn.Module | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ):
        self.items: list[dict[str, Any]] = []
        with tqdm(
            total=len(prepared), desc="Preparing examples", unit=" examples", leave=False, disable=not progress
        ) as bar:
            for start in range(0, len(prepared), batch_size):
                batch = [prepared[index] for index in range(start, min(start + batch_size, len(prepared)))]
                if vision_tokenizer is not None:
                    replace_pixels(batch, vision_tokenizer)
                self.items += batch
                bar.update(len(batch))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@torch.no_grad()
def replace_pixels(items: list[dict[str, Any]], vision_tokenizer: torch.nn.Module):
    """Puts `image_codes` `(num_images, h, w)` in the place of `pixel_values` in those items that have pictures."""
    with_images = [item for item in items if "pixel_values" in item]
    if not with_images:
        return
    pictures = [item.pop("pixel_values") for item in with_images]
    pixels = to_unit_range(torch.cat(pictures)).to(vision_tokenizer.device)
    codes = vision_tokenizer.quantize(vision_tokenizer.encode(pixels).latents, return_losses=False).codes.cpu()
    for item, own in zip(with_images, codes.split([len(picture) for picture in pictures]), strict=True):
        item["image_codes"] = own


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in 0..255 to floats in `[-1, 1]`."""
    return pixels.float() / 127.5 - 1


PADDING_BRANCH = -1


def branch_layout(branches: torch.LongTensor) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """Who sees whom, `(batch_size, 1, length, length)`, and positions `(batch_size, length)`, for sequences whose
    branches `(batch_size, length)` number the turns behind a shared part 0: a token sees the shared part and its own
    branch, up to itself, and each branch goes on where the shared part ends.

    >>> mask, positions = branch_layout(torch.tensor([[0, 0, 1, 1, 2]]))
    >>> positions.tolist()
    [[0, 1, 2, 3, 2]]
    >>> mask[0, 0, 4].tolist()
    [True, True, False, False, True]
    """
    sees = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    sees &= torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool).tril()
    return sees[:, None], sees.sum(dim=-1) - 1


@dataclass
class ETTCollator:
    """Prepared examples to a batch, padded on the right.

    `input_ids`, `attention_mask` `(batch_size, length)`; `labels` of the same shape, left out for drawing;
    `pixel_values` `(num_images, 3, H, W)` in `[-1, 1]` or `image_codes` `(num_images, h, w)`; for drawing from codes
    also `code_labels`.

    >>> items = [{"input_ids": [7, 8], "labels": [-100, 8]}, {"input_ids": [9], "labels": [9]}]
    >>> batch = ETTCollator(pad_token_id=0)(items)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[7, 8], [9, 0]], [[-100, 8], [9, -100]])
    """

    pad_token_id: int = 0
    is_drawing: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        if "input_ids" in items[0]:
            batch["input_ids"] = self._pad([item["input_ids"] for item in items], self.pad_token_id)
            batch["attention_mask"] = self._pad([[1] * len(item["input_ids"]) for item in items], 0)
            if not self.is_drawing:
                batch["labels"] = self._pad([item["labels"] for item in items], IGNORED)
        if "branches" in items[0]:
            branches = self._pad([item["branches"] for item in items], PADDING_BRANCH)
            batch["attention_mask"], batch["position_ids"] = branch_layout(branches)
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        codes = [item["image_codes"] for item in items if "image_codes" in item]
        if pixels:
            batch["pixel_values"] = to_unit_range(torch.cat(pixels))
        if codes:
            batch["image_codes"] = torch.cat(codes)
            if self.is_drawing:
                batch["code_labels"] = batch["image_codes"]
        return batch

    @staticmethod
    def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])


__all__ = [
    "TASKS",
    "ETTCollator",
    "FolderExamples",
    "InMemoryDataset",
    "PreparedDataset",
    "SceneExamples",
]
