"""Where examples come from: the embedded scenes, or the user's own images.

An *example* is a dict: `name` (for reports), `images` (a list of images) or `image_codes` `(num_images, h, w)`,
and, by task, `text` or `messages`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ett import scenes_ett
from ett.processing_ett import CAPTION_PROMPT

from .captions import caption_texts
from .rows import UNUSABLE, open_rows
from .selection import select_rows
from .skipped import SkippedRows
from .tasks import TASKS

QUESTION_ORDER = (
    *("position", "colour", "shape", "position", "count"),
    *("colour", "reading", "position", "relation", "shape"),
)
"""The order in which a scene is asked about, as far as it has such questions. Places come most often: to search the
image is learned last."""


class SceneExamples(Dataset):
    """Examples drawn on the fly from scenes, the same for the same task, seed, split and index.

    Args:
        questions_per_scene (`int`): Questions in a conversation, and in what follows a text.
        ground (`str`): Of `scenes_ett.GROUNDS`: what lies behind the shapes.
        independent_turns (`bool`): Turns will see nothing of one another (see [`PreparedDataset`]), so that a request
            for a caption, which would give answers away, need not be a conversation of its own.
    """

    def __init__(
        self,
        task: str,
        seed: int,
        split: str,
        length: int,
        questions_per_scene: int = 6,
        independent_turns: bool = False,
        ground: str = "mixed",
    ):
        self.task, self.seed, self.split, self.length = TASKS[task], seed, split, length
        self._is_chat = self.task.column == "messages"
        self.questions_per_scene, self.independent_turns = questions_per_scene, independent_turns
        self.scenes = scenes_ett.Scenes(seed, split, ground=ground)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        scene = self.scenes[index]
        name = f"scene {index}"
        if self.task.predicts_codes:
            # Captions, which name each shape's colour and place, teach colours sooner than prompts alone. Longer ones
            # than prompts would only lengthen their batches.
            if scene.text is None and len(scene.shapes) <= 2:
                return {"name": name, "images": [scene.render()], "text": scenes_ett.caption(scene, rng)}
            prompt, scene = scenes_ett.drawing_pair(self.seed, self.split, index, self.scenes.ground)
            return {"name": name, "images": [scene.render()], "text": prompt.text}
        example = {"name": name, "images": [scene.render()] if self.task.has_images else []}
        if self.task.column == "text":
            example["text"] = scenes_ett.caption(scene, rng)
        if self.questions_per_scene and (self._is_chat or not self.task.has_images):
            example["messages"] = self._conversation(scene, rng)
        return example

    def filters_report(self) -> list[dict[str, Any]]:
        """None: scenes are not filtered."""
        return []

    def texts(self) -> list[str]:
        """Every word that a word-level tokenizer has to know."""
        return scenes_ett.vocabulary()

    def spelled(self) -> Sequence[str]:
        """Words that a word-level tokenizer spells letter by letter."""
        return scenes_ett.WORDS

    def _conversation(self, scene: scenes_ett.Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Questions and answers, and for about every fourth image a request for a caption."""
        questions = scenes_ett.questions(scene, rng)
        described = []
        if self._is_chat and rng.random() < 0.25:
            described = [(CAPTION_PROMPT, scenes_ett.caption(scene, rng))]
            if not self.independent_turns:
                return _turns(described, with_image=True)
        by_type = {kind: [q for q in questions if q.type == kind] for kind in scenes_ett.QUESTION_TYPES}
        turns = []
        for kind in itertools.cycle(QUESTION_ORDER):
            if len(turns) == self.questions_per_scene or not any(by_type.values()):
                break
            if left := by_type[kind]:
                question = left.pop(rng.integers(len(left)))
                turns.append((question.question, question.answer))
        return _turns(turns + described, with_image=self._is_chat)


def _turns(questions: list[tuple[str, str]], with_image: bool) -> list[dict[str, Any]]:
    messages = []
    for question, answer in questions:
        content = [{"type": "text", "text": question}]
        if with_image and not messages:
            content.insert(0, {"type": "image"})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


class FolderExamples(Dataset):
    """Examples of the user's own: a folder of images with `metadata.jsonl` (the imagefolder convention of datasets),
    JSON, Parquet or tar files (webdataset), or any dataset that [`datasets.load_dataset`] takes. Those of a folder
    that `ett tokenize` wrote have codes in the place of images.

    A row that cannot be used (an image that cannot be read, no caption, placeholders that do not fit the images) is
    skipped, named and counted, wherever it stands: the next usable one takes its place. A number is text.

    Args:
        path (`str`): Folder, file, pattern of files or name on the Hub.
        filters (`list[dict]`): Settings of a [`FilterChain`], by which rows are chosen now.
        columns: Further arguments of [`open_rows`]: `split`, `image_column`, `text_column`, `messages_column`,
            `image_folder`, `seed`.

    Attributes:
        skipped (`dict[str, str]`): Rows that were skipped, by name, and why; damaged tars too.

    Raises:
        ValueError: There is nothing to learn from, a column is missing, or none of the first rows can be used.
    """

    def __init__(self, path: str, task: str, filters: list[dict[str, Any]] | None = None, **columns: Any):
        self.path = path
        self.rows, self.reader = open_rows(path, task, **columns)
        self.filters = self.reader.filters(filters or [], getattr(self.rows, "column_names", None))
        self.numbers: Sequence[int] = range(len(self.rows))
        if filters:
            self.numbers = select_rows(self.rows, self.filters, self.reader.view if self.reader.is_tar else None)
        self._skipped = SkippedRows()
        for shard, cause in getattr(self.rows, "damaged", {}).items():
            self._skipped.note(shard, f"Only its beginning can be read: {cause}.")

    @property
    def skipped(self) -> dict[str, str]:
        return self._skipped.reasons

    def take_skipped(self) -> dict[str, str]:
        """As [`SkippedRows.take`]."""
        return self._skipped.take()

    def filters_report(self) -> list[dict[str, Any]]:
        """As [`FilterChain.report`]."""
        return self.filters.report()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            number = int(self.numbers[(index + offset) % len(self)])
            row = self.rows[number]
            name = self.reader.name(row, number)
            try:
                return self.reader(row, name)
            except UNUSABLE as error:
                self._skipped.note(name, str(error))
        raise ValueError(f"None of the {len(self)} examples of '{self.path}' can be read.")

    def texts(self) -> list[str]:
        """Every text that a word-level tokenizer has to know.

        Raises:
            ValueError: There are no captions or prompts.
        """
        column = self.reader.text_column
        if column not in getattr(self.rows, "column_names", ()):
            raise ValueError(
                "A new language model takes its vocabulary from captions in a column; these data have none."
            )
        return [text for cell in self.rows.select(self.numbers)[column] for text in caption_texts(cell) if text]

    def spelled(self) -> Sequence[str]:
        """No word: those of captions are whole."""
        return ()


__all__ = ["FolderExamples", "SceneExamples"]
