"""Tasks: an example to pieces of text, each marked as predicted or not. Placeholders stand for images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ett.processing_ett import ETTProcessor

Segments = list[tuple[str, bool]]


def num_images(example: dict[str, Any]) -> int:
    """How many images an example has, as such or as codes."""
    return len(example["image_codes"] if "image_codes" in example else example["images"])


def text_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """Text alone, all of it predicted; a conversation about it follows where there is one."""
    text = example["text"] + processor.end_token
    if "messages" in example:
        # A template may begin with BOS, which stands before the text already.
        text += processor.apply_chat_template(example["messages"]).removeprefix(processor.tokenizer.bos_token or "")
    return [(text, True)]


def caption_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """An image and its caption, which is predicted (equation 2), as the answer to the processor's `caption_prompt`:
    so a model describes images when asked to from the first stage on."""
    request = [{"type": "image"}] * num_images(example) + [{"type": "text", "text": processor.caption_prompt}]
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": example["text"]}]
    return chat_segments({"messages": messages}, processor)


def chat_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """A conversation in the chat template; the assistant's turns are predicted, with the token that ends them."""
    messages, end = example["messages"], processor.end_token
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
    """A prompt, then the image, whose codes are predicted."""
    return [(example["text"] + processor.image_token, False)]


def no_segments(example: dict[str, Any], processor: ETTProcessor) -> Segments:
    """Images alone."""
    return []


@dataclass(frozen=True)
class Task:
    """What a model learns from an example.

    Args:
        segments: Makes the example's pieces of text.
        column (`"text"` or `"messages"`, *optional*): What a row holds beside its images.
        has_images (`bool`): Whether rows hold images.
        is_of_tokenizer (`bool`): Whether a tokenizer alone learns it, without a language model.
        predicts_codes (`bool`): Whether image codes are predicted, and no text.
        kind (`str`): Of the finished model, for its card.
        keeps_discriminator (`bool`): Whether the stage stands between two that train a discriminator, and its folder
            keeps the file of the folder that it started from.
    """

    segments: Callable[[dict[str, Any], ETTProcessor], Segments]
    column: str | None = "text"
    has_images: bool = True
    is_of_tokenizer: bool = False
    predicts_codes: bool = False
    kind: str = "chat"
    keeps_discriminator: bool = False

    @property
    def predicts_text(self) -> bool:
        return not (self.is_of_tokenizer or self.predicts_codes)


TASKS = {
    "reconstruction": Task(no_segments, column=None, is_of_tokenizer=True, kind="tokenizer"),
    "text": Task(text_segments, has_images=False, keeps_discriminator=True),
    "caption": Task(caption_segments, keeps_discriminator=True),
    "chat": Task(chat_segments, column="messages"),
    "drawing": Task(drawing_segments, predicts_codes=True, kind="gen"),
}


__all__ = ["TASKS", "Segments", "Task", "num_images"]
