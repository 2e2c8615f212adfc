"""Loading a model from a folder or the Hub, and what the command line does with one."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rooms import room

if TYPE_CHECKING:
    import torch
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
TILED_ABOVE = 1024
"""Pixels along a side above which pictures are reconstructed in tiles."""


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
    except ValueError as error:
        raise ModelError(f"The config.json of {model} is not valid JSON ({error}).") from error
    kind = (config.get("model_type") or config.get("_class_name")) if isinstance(config, dict) else None
    return str(kind or "unknown")


def _fetch_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(
            f"There is no folder {model} here, and no model of that name could be had from the Hugging Face Hub; "
            "train one with `ett demo`, or name another."
        ) from error


def _load(loader: Any, model: str) -> Any:
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(model)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{model} is incomplete or damaged: its {loader.__name__} could not be loaded ({error})."
        ) from error


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
            f"{model} is an IBQ tokenizer: it has no language model and only reconstructs pictures (ett reconstruct); "
            f"name an ETT model such as {'ett-gen' if draws else 'ett-chat'} instead."
        )
    if kind != "ett":
        raise ModelError(f"{model} is a model of type {kind!r}; expected an ETT model (model_type 'ett').")
    config = _load(room("modeling_ett.configuration_ett").ETTConfig, model)
    if draws and not config.visual_head:
        raise ModelError(
            f"{model} has no visual head, so it reads pictures but cannot draw them; name a generation model such as "
            "ett-gen instead."
        )
    if answers and not config.answers:
        raise ModelError(f"{model} was trained to draw and not to answer; name a chat model such as ett-chat instead.")
    return config, _load(room("processing_ett").ETTProcessor, model)


def _load_weights(model: str) -> Any:
    return _load(room("modeling_ett.modeling_ett").ETTForConditionalGeneration, model).to(_device()).eval()


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
    image_processor = _load(room("processing_ett").ETTImageProcessor, model)
    tokenizer = _load(room("modeling_ett.modeling_ibq").IBQModel, model)
    return tokenizer.to(_device()).eval(), image_processor


def caption(image: str, model: str, max_new_tokens: int = 64) -> str:
    """Describes a picture in words."""
    picture = room("processing_ett").load_image(image)
    return _answer(picture, None, model, max_new_tokens)


def ask(image: str, question: str, model: str, max_new_tokens: int = 64) -> str:
    """Answers a question about a picture."""
    if not question.strip():
        raise ValueError("The question is empty; ask something about the picture.")
    picture = room("processing_ett").load_image(image)
    return _answer(picture, question, model, max_new_tokens)


def serve(model: str, host: str, port: int, device: str):
    """Answers requests over HTTP, as `transformers serve` does, until it is interrupted.

    Raises:
        ModelError: There is no such model, it is of another kind, or it was trained to draw.
        ImportError: The packages of `transformers[serving]` are missing.
    """
    _load_processor(model, answers=True)
    from transformers.cli.serve import Serve

    Serve(model, host=host, port=port, device=device)


def draw(
    prompt: str,
    model: str,
    count: int = 1,
    seed: int = 0,
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    jacobi_window: int = 1,
) -> list["Image.Image"]:
    """Draws `count` pictures; picture i depends, but for rounding, on `seed + i` alone, however many there are."""
    import torch

    config, processor = _load_processor(model, draws=True)
    num_codes = math.prod(processor.code_grid((config.image_size, config.image_size)))
    config.check_context(processor.prepare_drawing(prompt)["input_ids"].shape[1], num_codes)
    loaded = _load_weights(model)
    pipe = room("processing_ett.text_to_image_pipeline_ett").ETTTextToImagePipeline(loaded, processor)
    pipe.set_progress_bar_config(disable=None, leave=False)
    return pipe(
        prompt,
        num_images_per_prompt=count,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        jacobi_window=jacobi_window,
        generator=[torch.Generator(loaded.device).manual_seed(seed + index) for index in range(count)],
    ).images


def reconstruct(
    image: str, model: str, height: int | None = None, width: int | None = None, own_size: bool = False
) -> tuple["Image.Image", float]:
    """Encodes a picture to codes and decodes it again; in tiles where a side is longer than `TILED_ABOVE` pixels.

    Args:
        height, width: Pixels that the picture is resized and cropped to, multiples of the tokenizer's factor; one left
            out is that of the image processor in the model's folder.
        own_size: Keep the picture's pixels as they are; only cut off at the edges what divides into no codes.

    Returns:
        The reconstruction, and its PSNR in dB against the picture as the tokenizer saw it.

    Raises:
        ValueError: A side is no multiple of the factor, is given together with `own_size`, or the picture is smaller
            than a code.
    """
    import torch

    if own_size and (height or width):
        raise ValueError(
            "A size was given and the picture's own asked for; give either a height and width or own_size."
        )
    picture = room("processing_ett").load_image(image)
    tokenizer, image_processor = load_tokenizer(model)
    if own_size:
        picture = _crop_to_multiples(picture, tokenizer.spatial_factor)
        width, height = picture.size
    size = {"height": height or image_processor.size["height"], "width": width or image_processor.size["width"]}
    if max(size.values()) > TILED_ABOVE:
        tokenizer.enable_tiling()
    pixels = image_processor(picture, size=size, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(tokenizer.device, tokenizer.dtype)
    with torch.no_grad():
        codes = tokenizer.encode_codes(pixels)
        decoded = tokenizer.decode_codes(codes).sample.clamp(-1, 1)
    mean_squared_error = (decoded - pixels).float().square().mean()
    psnr = 10 * torch.log10(4 / mean_squared_error)
    return image_processor.post_process(decoded)[0], psnr.item()


def _crop_to_multiples(picture: "Image.Image", factor: int) -> "Image.Image":
    """The centre of a picture, with the largest sides that are multiples of `factor`."""
    width, height = (side // factor * factor for side in picture.size)
    if 0 in (width, height):
        raise ValueError(
            f"The picture is {picture.height} x {picture.width} pixels (height x width); at its own size this "
            f"tokenizer needs at least {factor} x {factor}. Give a height and width instead."
        )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def check_image_path(path: str | os.PathLike, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Path:
    """A path that a picture may be written to.

    Raises:
        ValueError: Its suffix is not a picture's, or it is a folder, or its folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} has no image's suffix; expected one of {', '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the image file to write.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} into.")
    return path


def save_image(picture: "Image.Image", path: Path):
    """Writes a picture under a temporary name first, so that an interruption leaves no half of one."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    picture.save(temporary)
    temporary.replace(path)


def _answer(picture: "Image.Image", question: str | None, model: str, max_new_tokens: int) -> str:
    config, processor = _load_processor(model, answers=True)
    inputs = processor.apply_chat_template(
        processor.chat_about(picture, question), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    config.check_context(inputs["input_ids"].shape[1])
    loaded = _load_weights(model)
    tokens = loaded.generate(**inputs.to(loaded.device), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.post_process_image_text_to_text(tokens[:, inputs["input_ids"].shape[1] :])[0].strip()


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


__all__ = [
    "IMAGE_SUFFIXES",
    "ModelError",
    "ask",
    "caption",
    "check_image_path",
    "draw",
    "load_ett",
    "load_tokenizer",
    "model_kind",
    "reconstruct",
    "save_image",
    "serve",
]
