"""`ett chat`: a conversation in the terminal, with images, streamed answers and drawings."""

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
Write a message; the path of an image file in it shows the image to the model.
  /image PATH   show an image with the next message (a path with spaces, or a URL)
  /draw PROMPT  draw an image
  /new          begin a new conversation
  /help         show this
  /quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


class _Pieces(TextStreamer):
    """Hands on the pieces of an answer as they come."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.written = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        piece = text if self.written else text.lstrip()
        self.written += piece
        self.write(piece)


class Conversation:
    """Turns and images of a chat, all of which the model sees again with each question.

    Args:
        model (`ETTForConditionalGeneration`), processor (`ETTProcessor`): As `load_ett` gives them.
        max_new_tokens (`int`): Longest answer.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 256):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.begin_anew()

    def begin_anew(self):
        """Forgets everything."""
        self.messages: list[dict[str, Any]] = []
        self.images: list[Image.Image] = []
        self.shown: list[Image.Image] = []

    def show(self, image: str):
        """Adds an image, a path or a URL, to the next question.

        Raises:
            ImageError: It cannot be used.
        """
        self.shown.append(load_image(image))

    def ask(self, text: str, write: Callable[[str], None] = lambda piece: None) -> str:
        """Answers, and remembers question and answer. Interrupted (`KeyboardInterrupt`), the answer is what there is.

        Args:
            write: Takes the answer piece by piece.

        Raises:
            ValueError: The conversation does not fit the model's context, or has words beyond its vocabulary. It is
                then as it was before.
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
                "begin a new one with /new."
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
    """Reads lines, carries them out, and says in a sentence what went wrong.

    Args:
        conversation: With the chat model.
        drawing_model (`str`): Folder or Hub name of the model that draws, loaded when it is first needed.
        output_dir (`Path`): Where drawings go.
        seed (`int`): Of the first drawing; each further one has the next.
    """

    def __init__(self, conversation: Conversation, drawing_model: str, output_dir: Path, seed: int = 0):
        self.conversation, self.drawing_model, self.output_dir = conversation, drawing_model, output_dir
        self.seed, self.pipeline = seed, None

    def run(self, read: Callable[[str], str] = input):
        """Goes on until `/quit`, or the end of the input."""
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
        """
        Raises:
            ValueError: A command is unknown or lacks its argument, or cannot be carried out.
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
            raise ValueError(f"There is no command {command}; /help shows those there are.")
        elif not argument:
            raise ValueError(f"{command} needs {'a path' if command == '/image' else 'a prompt'} behind it.")
        elif command == "/image":
            self.conversation.show(argument)
        else:
            self.draw(argument)

    def say(self, line: str):
        """Asks what the line says; image files named in it are shown."""
        words = line.split()
        files = [word for word in words if word.lower().endswith(IMAGE_SUFFIXES) and Path(word).is_file()]
        for file in files:
            self.conversation.show(file)
        text = " ".join(word for word in words if word not in files)
        if not text:
            # The image goes with the next message.
            return
        self.conversation.ask(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo()

    def draw(self, prompt: str):
        """Draws an image into a new file."""
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
    """Talks with a model until the user leaves.

    Raises:
        ValueError: There is no such model, or no such folder for drawings.
    """
    if not output_dir.is_dir():
        raise ValueError(f"There is no folder {output_dir} to write drawings into.")
    loaded, processor = load_ett(model, answers=True)
    try:
        import readline  # noqa: F401 - lines can be edited, and former ones brought back
    except ImportError:
        pass
    Terminal(Conversation(loaded, processor, max_new_tokens), drawing_model, output_dir, seed).run()


__all__ = ["Conversation", "Terminal", "chat"]
