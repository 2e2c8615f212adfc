"""`ett chat`: a conversation in the terminal, with images, streamed answers and image generation."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image
from transformers import TextStreamer

from .inference import IMAGE_SUFFIXES, load_ett, save_image
from .processing_ett import load_image
from .processing_ett.text_to_image_pipeline_ett import ETTTextToImagePipeline

HELP = """\
Write a message. To show an image to the model, put the path of its file into the message.
  /image PATH   show an image with the next message (a path with spaces, or a URL)
  /draw PROMPT  generate an image
  /new          start a new conversation
  /help         show this help
  /quit         exit, like Ctrl-D; Ctrl-C stops an answer"""


class _Pieces(TextStreamer):
    """Streamer that passes each piece of an answer to `write` and collects the whole answer in `written`."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.written = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        piece = text if self.written else text.lstrip()
        self.written += piece
        self.write(piece)


class Conversation:
    """Turns and images of a chat. The model sees all of them again with each question.

    Args:
        model (`ETTForConditionalGeneration`): Chat model, as returned by `load_ett`.
        processor (`ETTProcessor`): Its processor, as returned by `load_ett`.
        max_new_tokens (`int`, defaults to 256): Maximum length of an answer, in tokens.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 256):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.begin_anew()

    def begin_anew(self):
        """Delete all turns and images."""
        self.messages: list[dict[str, Any]] = []
        self.images: list[Image.Image] = []
        self.shown: list[Image.Image] = []

    def show(self, image: str):
        """Add an image, given as a path or URL, to the next question.

        Raises:
            ImageError: If the image cannot be read.
        """
        self.shown.append(load_image(image))

    def ask(self, text: str, write: Callable[[str], None] = lambda piece: None) -> str:
        """Answer a question and add both to the conversation.

        A `KeyboardInterrupt` ends the answer early; the conversation keeps the part so far.

        Args:
            text (`str`): The question.
            write (`Callable[[str], None]`, *optional*): Receives the answer piece by piece.

        Returns:
            `str`: The whole answer.

        Raises:
            ValueError: If the conversation exceeds the model's context, or contains words outside its vocabulary. The
                conversation then stays unchanged.
        """
        content = [{"type": "image"}] * len(self.shown) + [{"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        images = [*self.images, *self.shown]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=[images], text=[prompt]).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        context = getattr(self.model.config.text_config, "max_position_embeddings", math.inf)
        if length >= context:
            raise ValueError(
                f"With this question the conversation has {length} tokens, but the model's context ends at {context}; "
                "start a new conversation with /new."
            )
        pieces = _Pieces(self.processor.tokenizer, write)
        try:
            self.model.generate(
                **inputs,
                max_new_tokens=min(self.max_new_tokens, context - length),
                do_sample=False,
                streamer=pieces,
            )
        except KeyboardInterrupt:
            pass
        answer = pieces.written.strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.images, self.shown = images, []
        return answer


class Terminal:
    """Read lines, run them as messages or commands, and print each error as one sentence.

    Args:
        conversation (`Conversation`): Conversation with the chat model.
        drawing_model (`str`): Folder or Hub name of the model that generates images. The first `/draw` loads it.
        output_dir (`Path`): Folder for generated images.
        seed (`int`, defaults to 0): Seed of the first generated image. Each further image adds one.
    """

    def __init__(self, conversation: Conversation, drawing_model: str, output_dir: Path, seed: int = 0):
        self.conversation, self.drawing_model, self.output_dir = conversation, drawing_model, output_dir
        self.seed, self.pipeline = seed, None

    def run(self, read: Callable[[str], str] = input):
        """Run lines until `/quit` or the end of the input."""
        typer.echo(HELP)
        while True:
            try:
                line = read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                typer.echo()
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self.carry_out(line)
            except (ValueError, OSError) as error:
                typer.echo(" ".join(str(error).split()))

    def carry_out(self, line: str):
        """Run one line, a message or a command.

        Raises:
            ValueError: If the command is unknown, lacks its argument or fails.
        """
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if not command.startswith("/") or Path(command).exists():
            if line:
                self.say(line)
        elif command == "/help":
            typer.echo(HELP)
        elif command == "/new":
            self.conversation.begin_anew()
        elif command not in ("/image", "/draw"):
            raise ValueError(f"{command} is not a command; /help lists all commands.")
        elif not argument:
            raise ValueError(f"{command} needs {'a path' if command == '/image' else 'a prompt'} after it.")
        elif command == "/image":
            self.conversation.show(argument)
        else:
            self.draw(argument)

    def say(self, line: str):
        """Send a message to the model, with the image files that it names."""
        words = line.split()
        files = [word for word in words if word.lower().endswith(IMAGE_SUFFIXES) and Path(word).is_file()]
        for file in files:
            self.conversation.show(file)
        text = " ".join(word for word in words if word not in files)
        if not text:
            # The next message sends the image.
            return
        self.conversation.ask(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo()

    def draw(self, prompt: str):
        """Generate an image and write it to a new file."""
        if self.pipeline is None:
            self.pipeline = ETTTextToImagePipeline(*load_ett(self.drawing_model, draws=True))
            self.pipeline.set_progress_bar_config(disable=None, leave=False)
        generator = torch.Generator(self.pipeline.device).manual_seed(self.seed)
        image = self.pipeline(prompt, generator=generator).images[0]
        path = _free_name(self.output_dir)
        save_image(image, path)
        typer.echo(f"Wrote {path} (seed {self.seed}).")
        self.seed += 1


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder / f"drawing-{number}.png").exists():
        number += 1
    return path


def chat(model: str, drawing_model: str, output_dir: Path, max_new_tokens: int, seed: int):
    """Run a conversation in the terminal until the user exits.

    Args:
        model (`str`): Folder or Hub name of the chat model.
        drawing_model (`str`), output_dir (`Path`), seed (`int`): As for [`Terminal`].
        max_new_tokens (`int`): As for [`Conversation`].

    Raises:
        ValueError: If the model or the folder for generated images does not exist.
    """
    if not output_dir.is_dir():
        raise ValueError(f"There is no folder {output_dir} to write images into; create it first.")
    loaded, processor = load_ett(model, answers=True)
    try:
        import readline  # noqa: F401 - enables line editing and history
    except ImportError:
        pass
    Terminal(Conversation(loaded, processor, max_new_tokens), drawing_model, output_dir, seed).run()


__all__ = ["Conversation", "Terminal", "chat"]
