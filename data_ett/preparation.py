"""From examples to numbers: token ids, which of them are predicted, and pixels or codes."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ett.common_ett.images import to_unit_range
from ett.processing_ett import ETTImageProcessor, ETTProcessor

from .collator import IGNORED
from .skipped import SkippedRows
from .tasks import TASKS, Segments, num_images

FIRST_EXAMPLES = 100
"""Examples of each source of which one has to be usable."""

MOST_UNUSABLE = 1000
"""Unusable examples in a row after which training stops."""


def independent_conversations(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each pair of turns as a conversation of its own, with the first turn's images; a system's turn stays in all.

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
    images = [part for part in first if part["type"] == "image"] if isinstance(first, list) else []
    conversations = []
    for question, answer in zip(asked, answered, strict=True):
        content = question["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part for part in content if part["type"] != "image"]
        conversations.append([*system, {"role": "user", "content": [*images, *texts]}, answer])
    return conversations


class PreparedDataset(Dataset):
    """Examples as the collator takes them: `input_ids` and `labels` (lists of `int`) and `pixel_values`
    `(num_images, 3, H, W)` of uint8, which the collator maps to `[-1, 1]`, or `image_codes` `(num_images, h, w)` of
    examples that have these instead of images.

    Args:
        examples (`Dataset`): [`SceneExamples`], [`FolderExamples`], [`MixedExamples`], or a stream, of which
            [`PreparedStream`] then prepares one example after the other.
        processor ([`ETTProcessor`], or [`ETTImageProcessor`] for reconstruction).
        prompt_dropout (`float`): Share of examples whose text is left out, for guidance (drawing).
        max_length (`int`): Longer sequences are skipped: cutting one would tear an image or an answer apart.
        independent_turns (`bool`): Each turn of a conversation is asked as if it were the first: turns share the
            image before them and see nothing of one another, so that no answer gives another away. Items then also
            hold `branches`, 0 for what is shared and the turn's number for the rest of the tokens.

    An example that cannot be prepared (too long, words beyond the vocabulary, the model's image token in its text) is
    skipped, named and counted: the next usable one takes its place.
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
        self.examples, self.task, self.processor = examples, TASKS[task], processor
        self.seed, self.prompt_dropout, self.max_length = seed, prompt_dropout, max_length
        self.independent_turns = independent_turns and self.task.column == "messages"
        self._skipped = SkippedRows()
        if self.task.predicts_text:
            # Before any example is read; see its error.
            processor.end_token  # noqa: B018
        if not self.task.is_of_tokenizer:
            placeholder = processor.image_placeholder()
            self.image_ids = processor.tokenizer(placeholder, add_special_tokens=False)["input_ids"]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._next_usable(index)
        # A worker's examples are a copy, of which nothing is seen but its items.
        skipped = self.examples.take_skipped() if hasattr(self.examples, "take_skipped") else {}
        skipped = {**skipped, **self._skipped.take()}
        return {**item, "skipped": skipped} if skipped else item

    @property
    def skipped(self) -> dict[str, str]:
        """Rows that were skipped in this process, by name, and why."""
        return {**getattr(self.examples, "skipped", {}), **self._skipped.reasons}

    def check(self):
        """Prepares the first usable example of each source.

        Raises:
            ValueError: None of a source's first examples can be prepared.
        """
        for source in getattr(self.examples, "sources", {"": self.examples}).values():
            if isinstance(source, Dataset):
                count = min(FIRST_EXAMPLES, len(source))
                self._check((example["name"], example) for example in map(source.__getitem__, range(count)))
            else:
                self._check(source.first(FIRST_EXAMPLES))

    def _check(self, examples: Iterable[tuple[str, dict[str, Any] | ValueError]]):
        """The part of [`PreparedDataset.check`] for one source, whose examples are named; errors stand for unusable
        rows."""
        first, number = None, 0
        for number, (name, example) in enumerate(examples, 1):
            try:
                if isinstance(example, ValueError):
                    raise example
                self.prepare(example, number)
                return
            except ValueError as error:
                first = first or (name, error)
        if first:
            name, error = first
            raise ValueError(f"None of the first {number} examples can be used; the first, {name}: {error}") from error

    def _next_usable(self, index: int) -> dict[str, Any]:
        """The example of a number in numbers, or the first one after it that can be prepared."""
        for offset in range(tried := min(len(self), MOST_UNUSABLE)):
            number = (index + offset) % len(self)
            example = self.examples[number]
            name = example.get("name", f"example {number}")
            try:
                return self.prepare(example, number)
            except ValueError as error:
                self._skipped.note(name, str(error))
                last = name, error
        name, error = last
        raise ValueError(f"{tried} examples in a row cannot be used; the last, {name}: {error}") from error

    def prepare(self, example: dict[str, Any], number: int) -> dict[str, Any]:
        """One example in numbers; on its `number` depends whether its prompt is left out.

        Raises:
            ValueError: It is too long, has words beyond the vocabulary, or not one placeholder for each image.
        """
        if self.prompt_dropout and np.random.default_rng((self.seed, number)).random() < self.prompt_dropout:
            example = {**example, "text": ""}
        prepared: dict[str, Any] = {"name": example["name"]} if "name" in example else {}
        if not self.task.is_of_tokenizer:
            prepared |= self._branches(example) if self.independent_turns else self._tokens(example)
            self._check_length(prepared)
        if "image_codes" not in example:
            image_processor = getattr(self.processor, "image_processor", self.processor)
            prepared |= image_levels(example["images"], image_processor)
        elif len(example["image_codes"]):
            prepared["image_codes"] = example["image_codes"]
        return prepared

    def _tokens(self, example: dict[str, Any]) -> dict[str, list[int]]:
        return self._join(self.task.segments(example, self.processor), example)

    def _branches(self, example: dict[str, Any]) -> dict[str, list[int]]:
        """The example's turns as branches of one sequence, behind what all of them begin with."""
        turns = [
            self._join(self.task.segments({"messages": messages}, self.processor), example)
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
        """Segments to one sequence, as inference tokenizes them; each image's placeholder becomes one for each of
        its codes."""
        input_ids, labels = [], []
        texts, predicted = zip(*_joined(segments), strict=True)
        placeholders = sum(text.count(self.processor.image_token) for text in texts)
        if placeholders != num_images(example):
            raise ValueError(
                f"An example has {num_images(example)} images and {placeholders} placeholders "
                f"{self.processor.image_token} in its text; give one placeholder for each."
            )
        encoded = self.processor.encode_pieces(list(texts))
        if any(self.processor.tokenizer.unk_token_id in ids for ids in encoded):
            self.processor.check_vocabulary("\n".join(texts))
        for ids, is_predicted in zip(encoded, predicted, strict=True):
            expanded = []
            for token in ids:
                expanded += self.image_ids if token == self.processor.image_token_id else [token]
            input_ids += expanded
            labels += expanded if is_predicted else [IGNORED] * len(expanded)
        beginning = self.processor.beginning_ids
        # Nothing stands before BOS that could predict it.
        labels[: len(beginning)] = [IGNORED] * len(beginning)
        return {"input_ids": input_ids, "labels": labels}

    def _check_length(self, prepared: dict[str, list[int]]):
        if len(prepared["input_ids"]) > self.max_length:
            raise ValueError(
                f"An example is {len(prepared['input_ids'])} tokens long, more than "
                f"data.max_length={self.max_length}; shorten it or raise the limit."
            )


def _joined(segments: Segments) -> Segments:
    """Neighbours that are both predicted, or both not, as one: inference sees them as one text, too."""
    groups = itertools.groupby(segments, key=lambda segment: segment[1])
    return [("".join(text for text, _ in group), is_predicted) for is_predicted, group in groups]


class InMemoryDataset(Dataset):
    """Every example of a prepared dataset, prepared once. With a frozen tokenizer, images are kept as `image_codes`
    `(num_images, h, w)`, since a frozen tokenizer always gives the same codes.

    Attributes:
        skipped (`dict[str, str]`): Rows that were skipped, by name, and why.
    """

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
        self.skipped = prepared.skipped

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def image_levels(images: list[Image.Image], image_processor: ETTImageProcessor) -> dict[str, torch.Tensor]:
    """`pixel_values` `(num_images, 3, H, W)` of uint8, where there are images."""
    if not images:
        return {}
    pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": ((pixels + 1) * 127.5).round().to(torch.uint8)}


@torch.no_grad()
def replace_pixels(items: list[dict[str, Any]], vision_tokenizer: torch.nn.Module):
    """Puts `image_codes` `(num_images, h, w)` in the place of `pixel_values` in those items that have images."""
    with_images = [item for item in items if "pixel_values" in item]
    if not with_images:
        return
    images = [item.pop("pixel_values") for item in with_images]
    codes = vision_tokenizer.encode_codes(to_unit_range(torch.cat(images))).cpu()
    for item, own in zip(with_images, codes.split([len(image) for image in images]), strict=True):
        item["image_codes"] = own


__all__ = ["InMemoryDataset", "PreparedDataset", "image_levels", "replace_pixels"]
