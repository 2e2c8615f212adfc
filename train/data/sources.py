"""Where examples come from: the embedded scenes, or the user's own pictures.

An *example* is a dict: `name` (for reports), `images` (a list of pictures) and, by task, `text` or `messages`.
"""

import itertools
import logging
from typing import Any

import numpy as np
from torch.utils.data import Dataset

import scenes_ett
from processing_ett import CAPTION_PROMPT, ImageError
from processing_ett.picture_rows import load_rows, open_pictures, picture_name

logger = logging.getLogger(__name__)

QUESTION_ORDER = (
    *("position", "colour", "shape", "position", "count"),
    *("colour", "reading", "position", "relation", "shape"),
)
"""In which order a scene is asked about, as far as it has such questions. Where a thing is comes most often: to search
the picture is learned last."""


class SceneExamples(Dataset):
    """Examples drawn on the fly from scenes, the same for the same task, seed, split and index.

    Args:
        questions_per_scene (`int`): Questions in a conversation, and in what follows a text.
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
    ):
        self.task, self.seed, self.split, self.length = task, seed, split, length
        self.questions_per_scene, self.independent_turns = questions_per_scene, independent_turns
        self.scenes = scenes_ett.Scenes(seed, split)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        scene = self.scenes[index]
        name = f"scene {index}"
        if self.task == "drawing":
            # Captions say where everything stands, which teaches to follow a prompt sooner than prompts alone.
            if rng.random() < 0.75 and scene.text is None:
                return {"name": name, "images": [scene.render()], "text": scenes_ett.caption(scene, rng)}
            prompt, scene = scenes_ett.drawing_pair(self.seed, self.split, index)
            return {"name": name, "images": [scene.render()], "text": prompt.text}
        example = {"name": name, "images": [] if self.task == "text" else [scene.render()]}
        if self.task in ("text", "caption"):
            example["text"] = scenes_ett.caption(scene, rng)
        if self.task in ("text", "chat") and self.questions_per_scene:
            example["messages"] = self._conversation(scene, rng)
        return example

    def _conversation(self, scene: scenes_ett.Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Questions and answers, and for about every fourth picture a request for a caption."""
        questions = scenes_ett.questions(scene, rng)
        described = []
        if self.task == "chat" and rng.random() < 0.25:
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
        return _turns(turns + described, with_image=self.task == "chat")


def _turns(questions: list[tuple[str, str]], with_image: bool) -> list[dict[str, Any]]:
    messages = []
    for question, answer in questions:
        content = [{"type": "text", "text": question}]
        if with_image and not messages:
            content.insert(0, {"type": "image"})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


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
        needed = {"reconstruction": (image_column,), "text": (text_column,), "chat": (messages_column,)}
        columns = needed.get(task, (image_column, text_column))
        options = "data.image_column, data.text_column or data.messages_column"
        self.rows = load_rows(path, split, image_column, columns, options)
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            number = (index + offset) % len(self)
            row = self.rows[number]
            name = picture_name(row.get(self.image_column), number)
            try:
                return {"name": name, **self._example(row)}
            except ImageError as error:
                if name not in self.skipped:
                    self.skipped[name] = str(error)
                    logger.warning("Skipped picture %d: %s (%s)", len(self.skipped), name, error)
        raise ValueError(f"None of the {len(self)} pictures of '{self.path}' can be read.")

    def _example(self, row: dict[str, Any]) -> dict[str, Any]:
        cell = row.get(self.image_column) if self.task != "text" else None
        example: dict[str, Any] = {"images": open_pictures(cell)}
        if self.task == "chat":
            example["messages"] = row[self.messages_column]
        elif self.task != "reconstruction":
            example["text"] = row[self.text_column]
            if not isinstance(example["text"], str):
                raise ValueError(
                    f"'{self.path}' has an example whose {self.text_column!r} is {example['text']!r}; expected text."
                )
        return example


__all__ = ["FolderExamples", "SceneExamples"]
