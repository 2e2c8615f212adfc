"""Loading a model from a folder or the Hub, and what the command line does with one."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from PIL import Image

from .common_ett.metrics import psnr_of
from .modeling_ett.configuration_ett import ETTConfig
from .modeling_ett.loading_ett import load_whole
from .modeling_ett.modeling_ett import ETTForConditionalGeneration
from .modeling_ett.modeling_ibq import IBQModel
from .processing_ett import ETTImageProcessor, ETTProcessor, ImageError, load_image
from .processing_ett.text_to_image_pipeline_ett import ETTTextToImagePipeline

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
DTYPES = ("float32", "bfloat16", "float16", "auto")
LONGEST_PATH = 1024
"""Characters above which a path is left to the image reader, which shortens it in its error."""

TILED_ABOVE = 1024
"""Pixels along a side above which images are reconstructed in tiles."""


class ModelError(ValueError):
    """A model that is missing, or of a kind that cannot do what was asked."""


def model_kind(model: str) -> str:
    """`"ett"`, `"IBQModel"`, or whatever else the `config.json` of a folder or a Hub repository says that it is.

    Raises:
        ModelError: There is no such folder and no such repository, or it holds no readable `config.json`.
    """
    folder = Path(model)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            holds = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
            raise ModelError(f"{model} is not a model's folder: it has no config.json (it holds {holds}).")
    elif folder.exists():
        raise ModelError(f"{model} is a file; expected a model's folder.")
    else:
        path = _fetch_config(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"The config.json of {model} is not valid JSON ({error}).") from error
    kind = (config.get("model_type") or config.get("_class_name")) if isinstance(config, dict) else None
    return str(kind or "unknown")


def _fetch_config(model: str) -> Path:
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(
            f"There is no folder {model} here, and no model of that name could be had from the Hugging Face Hub; "
            "train one with `ett demo`, or name another."
        ) from error


def _load(load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"{arguments[-1]} is incomplete or damaged: {error}") from error


def _load_whole(model_class: Any, model: str, **options: Any) -> Any:
    return _load(load_whole, model_class, model, **options).eval()


def load_ett(model: str, draws: bool = False, answers: bool = False) -> tuple[Any, Any]:
    """Loads an ETT model, on the GPU where there is one, and its processor.

    Args:
        model: Folder or Hub repository.
        draws: Whether it has to have a visual head.
        answers: Whether it has to have learned to answer, and not to draw, last.

    Returns:
        The `ETTForConditionalGeneration`, in evaluation mode, and the `ETTProcessor`.

    Raises:
        ModelError: It is another kind of model, it cannot do what it has to, or its files are damaged.
    """
    processor = _load_processor(model, draws, answers)[1]
    return _load_weights(model), processor


def _load_processor(model: str, draws: bool = False, answers: bool = False) -> tuple[Any, Any]:
    """All of [`load_ett`] that is quick: the `ETTConfig` and the `ETTProcessor`."""
    kind = model_kind(model)
    if kind == "IBQModel":
        raise ModelError(
            f"{model} is an IBQ tokenizer: it has no language model and only reconstructs images (ett reconstruct); "
            f"name an ETT model such as {'ett-gen' if draws else 'ett-chat'} instead."
        )
    if kind != "ett":
        raise ModelError(f"{model} is a model of type {kind!r}; expected an ETT model (model_type 'ett').")
    config = _load(ETTConfig.from_pretrained, model)
    if draws and not config.visual_head:
        raise ModelError(
            f"{model} has no visual head, so it reads images but cannot draw them; name a generation model such as "
            "ett-gen instead."
        )
    if answers and not config.answers:
        raise ModelError(f"{model} was trained to draw and not to answer; name a chat model such as ett-chat instead.")
    return config, _load(ETTProcessor.from_pretrained, model)


def _load_weights(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    options = {} if dtype is None else {"dtype": dtype}
    loaded = _load_whole(ETTForConditionalGeneration, model, **options)
    if device is None:
        return loaded.to(_device())
    try:
        return loaded.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_tokenizer(model: str) -> tuple[Any, Any]:
    """Loads an IBQ tokenizer, by itself or out of an ETT model, and the image processor beside it.

    Returns:
        The `IBQModel`, in evaluation mode, and the `ETTImageProcessor`.

    Raises:
        ModelError: It is another kind of model, or its files are damaged.
    """
    kind = model_kind(model)
    if kind == "ett":
        loaded, processor = load_ett(model)
        return loaded.model.vision_tokenizer, processor.image_processor
    if kind != "IBQModel":
        raise ModelError(f"{model} is a model of type {kind!r}; expected an IBQ tokenizer or an ETT model.")
    image_processor = _load(ETTImageProcessor.from_pretrained, model)
    tokenizer = _load_whole(IBQModel, model)
    return tokenizer.to(_device()), image_processor


def caption(image: str, model: str, max_new_tokens: int = 64) -> str:
    """Describes an image in words."""
    return captions([image], model, max_new_tokens)[0]


def captions(
    images: Sequence[str],
    model: str,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> list[str]:
    """Describes images in words, each by itself; the model is loaded once.

    Args:
        device: By default the GPU where there is one.
        dtype: Name of the weights' type, or `auto`, as they are stored. By default float32.

    Raises:
        ValueError: An image cannot be read, or a device or dtype cannot be used.
        ModelError: As for [`load_ett`].
    """
    opened = _open_images(images, dtype)
    config, processor = _load_processor(model, answers=True)
    chats = [processor.chat_about(image) for image in opened]
    return _answer(chats, config, processor, model, max_new_tokens, device, dtype)


def ask(
    image: str | Sequence[str],
    question: str,
    model: str,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> str:
    """Answers a question about an image, or about several together.

    Args:
        question: The images stand where it has the processor's image token, or else before it.

    Other arguments and errors are those of [`captions`].
    """
    if not question.strip():
        raise ValueError("The question is empty; ask something about the image.")
    opened = _open_images([image] if isinstance(image, str) else image, dtype)
    config, processor = _load_processor(model, answers=True)
    return _answer(
        [_chat_about(processor, opened, question)], config, processor, model, max_new_tokens, device, dtype
    )[0]


def _chat_about(processor: Any, images: list["Image.Image"], question: str) -> list[dict[str, Any]]:
    if len(images) == 1:
        return processor.chat_about(images[0], question)
    processor.check_prompts([question])
    texts = question.split(processor.image_token)
    if len(texts) != len(images) + 1:
        texts = [""] * len(images) + [question]
    content = [part for image, text in zip(images, texts, strict=False) for part in (_text(text), _image(image))]
    return [{"role": "user", "content": [*content, _text(texts[-1])]}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image(image: "Image.Image") -> dict[str, Any]:
    return {"type": "image", "image": image}


def _open_images(images: Sequence[str], dtype: str | None) -> list["Image.Image"]:
    """Opens images, after all that is wrong with their paths and with the type is said, which takes no library."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    for image in images:
        check_image_source(image)
    return [load_image(image) for image in images]


def check_image_source(image: str):
    """Raises [`ImageError`] where an image's path leads to no file; URLs pass. Loads no library."""
    if image.startswith(("http://", "https://", "data:image/")) or not image.strip():
        return
    try:
        is_file = os.path.isfile(image)
    except ValueError:
        return
    if not is_file and len(image) < LONGEST_PATH:
        raise ImageError(f"'{image}' is {'a folder' if os.path.isdir(image) else 'missing'}; expected an image file.")


def serve(model: str, host: str, port: int, device: str):
    """Answers requests over HTTP, as `transformers serve` does, until it is interrupted.

    Raises:
        ModelError: There is no such model, it is of another kind, or it was trained to draw.
        ImportError: The packages of `transformers[serving]` are missing.
    """
    _load_processor(model, answers=True)
    from transformers.cli.serve import Serve

    from .serving import answering_bad_requests

    with answering_bad_requests():
        Serve(model, host=host, port=port, device=device)


def draw(
    prompt: str,
    model: str,
    count: int = 1,
    seed: int = 0,
    jacobi_window: int = 1,
    **sampling: Any,
) -> list["Image.Image"]:
    """Generates `count` images; image i depends, but for rounding, on `seed + i` alone, however many there are.

    Args:
        sampling: `guidance_scale`, `temperature`, `top_k` and `top_p`; what is None or left out is the model's.
    """
    config, processor = _load_processor(model, draws=True)
    num_codes = math.prod(processor.code_grid((config.image_size, config.image_size)))
    config.check_context(processor.prepare_drawing(prompt)["input_ids"].shape[1], num_codes)
    loaded = _load_weights(model)
    pipe = ETTTextToImagePipeline(loaded, processor)
    pipe.set_progress_bar_config(disable=None, leave=False)
    return pipe(
        prompt,
        num_images_per_prompt=count,
        jacobi_window=jacobi_window,
        **sampling,
        generator=[torch.Generator(loaded.device).manual_seed(seed + index) for index in range(count)],
    ).images


def reconstruct(
    image: str, model: str, height: int | None = None, width: int | None = None, own_size: bool = False
) -> tuple["Image.Image", float]:
    """Encodes an image to codes and decodes it again; in tiles where a side is longer than `TILED_ABOVE` pixels.

    Args:
        height, width: Pixels that the image is resized and cropped to, multiples of the tokenizer's factor; one left
            out is that of the image processor in the model's folder.
        own_size: Keep the image's pixels as they are; only cut off at the edges what divides into no codes.

    Returns:
        The reconstruction, and its PSNR in dB against the image as the tokenizer saw it.

    Raises:
        ValueError: A side is no multiple of the factor, is given together with `own_size`, or the image is smaller
            than a code.
    """
    if own_size and (height or width):
        raise ValueError("A size was given and the image's own asked for; give either a height and width or own_size.")
    check_image_source(image)
    loaded = load_image(image)
    tokenizer, image_processor = load_tokenizer(model)
    if own_size:
        loaded = _crop_to_multiples(loaded, tokenizer.spatial_factor)
        width, height = loaded.size
    size = {"height": height or image_processor.size["height"], "width": width or image_processor.size["width"]}
    if max(size.values()) > TILED_ABOVE:
        tokenizer.enable_tiling()
    pixels = image_processor(loaded, size=size, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(tokenizer.device, tokenizer.dtype)
    with torch.no_grad():
        codes = tokenizer.encode_codes(pixels)
        decoded = tokenizer.decode_codes(codes).sample.clamp(-1, 1)
    psnr = psnr_of((decoded - pixels).float().square().mean())
    return image_processor.post_process(decoded)[0], psnr.item()


def _crop_to_multiples(image: "Image.Image", factor: int) -> "Image.Image":
    """The centre of an image, with the largest sides that are multiples of `factor`."""
    width, height = (side // factor * factor for side in image.size)
    if 0 in (width, height):
        raise ValueError(
            f"The image is {image.height} x {image.width} pixels (height x width); at its own size this "
            f"tokenizer needs at least {factor} x {factor}. Give a height and width instead."
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def check_image_path(path: str | os.PathLike, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Path:
    """A path that an image may be written to.

    Raises:
        ValueError: Its suffix is not an image's, or it is a folder, or its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} has no image's suffix; expected one of {', '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the image file to write.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} into.")
    return path


def save_image(image: "Image.Image", path: Path):
    """Writes an image under a temporary name first, so that an interruption leaves no half of one."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    image.save(temporary)
    temporary.replace(path)


def _answer(
    chats: list[list[dict[str, Any]]],
    config: Any,
    processor: Any,
    model: str,
    max_new_tokens: int,
    device: str | None,
    dtype: str | None,
) -> list[str]:
    """The answers to chats, one after another. What is wrong with one is said before the weights are loaded."""
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    prepared = [processor.apply_chat_template(chat, **template) for chat in chats]
    for inputs in prepared:
        config.check_context(inputs["input_ids"].shape[1])
    options = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    loaded = _load_weights(model, **options)
    answers = []
    for inputs in prepared:
        tokens = loaded.generate(**inputs.to(loaded.device), max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(processor.post_process_image_text_to_text(tokens[:, inputs["input_ids"].shape[1] :])[0].strip())
    return answers


def _device() -> "torch.device":
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


__all__ = [
    "IMAGE_SUFFIXES",
    "ModelError",
    "ask",
    "caption",
    "captions",
    "check_image_path",
    "check_image_source",
    "draw",
    "load_ett",
    "load_tokenizer",
    "model_kind",
    "reconstruct",
    "save_image",
    "serve",
]
