"""Loading of models from a folder or the Hub, and inference for the command line: caption, ask, draw, reconstruct."""

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
"""Length of a path in characters. The image reader checks longer paths, because it shortens them in its error."""

TILED_ABOVE = 1024
"""Side in pixels. Images with a longer side are reconstructed in tiles."""


class ModelError(ValueError):
    """Raised for a model that is missing, damaged, or of the wrong kind for the task."""


def model_kind(model: str) -> str:
    """Model type in the `config.json` of a folder or Hub repository.

    Args:
        model (`str`): Folder or Hub name.

    Returns:
        `str`: `"ett"`, `"IBQModel"`, another library's type, or `"unknown"`.

    Raises:
        ModelError: If neither the folder nor the repository exists, or it has no readable `config.json`.
    """
    folder = Path(model)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            holds = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
            raise ModelError(f"{model} is not a model folder: it has no config.json (it contains {holds}).")
    elif folder.exists():
        raise ModelError(f"{model} is a file; expected a model folder.")
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
            f"There is no folder {model}, and no model of this name could be loaded from the Hugging Face Hub; "
            "train a model with `ett demo` or name another model."
        ) from error


def _load(load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"{arguments[-1]} is incomplete or damaged: {error}") from error


def _load_whole(model_class: Any, model: str, **options: Any) -> Any:
    return _load(load_whole, model_class, model, **options).eval()


def load_ett(model: str, draws: bool = False, answers: bool = False) -> tuple[Any, Any]:
    """Load an ETT model and its processor, on the GPU if there is one.

    Args:
        model (`str`): Folder or Hub name.
        draws (`bool`, defaults to `False`): Require a visual head, for image generation.
        answers (`bool`, defaults to `False`): Require a model whose last training stage was not image generation.

    Returns:
        `tuple`: The `ETTForConditionalGeneration` in evaluation mode, and the `ETTProcessor`.

    Raises:
        ModelError: If the model is of another kind, lacks a required ability, or has damaged files.
    """
    processor = _load_processor(model, draws, answers)[1]
    return _load_weights(model), processor


def _load_processor(model: str, draws: bool = False, answers: bool = False) -> tuple[Any, Any]:
    """Load the `ETTConfig` and the `ETTProcessor`, with the checks of [`load_ett`] but without the weights."""
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
            f"{model} has no visual head, so it cannot generate images; name a generation model such as ett-gen "
            "instead."
        )
    if answers and not config.answers:
        raise ModelError(
            f"{model} was trained to generate images, not to answer; name a chat model such as ett-chat instead."
        )
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
    """Load an IBQ tokenizer and its image processor, from a tokenizer's folder or from an ETT model.

    Args:
        model (`str`): Folder or Hub name of the tokenizer or ETT model.

    Returns:
        `tuple`: The `IBQModel` in evaluation mode, and the `ETTImageProcessor`.

    Raises:
        ModelError: If the model is of another kind or has damaged files.
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
    """Describe an image in words; see [`captions`]."""
    return captions([image], model, max_new_tokens)[0]


def captions(
    images: Sequence[str],
    model: str,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> list[str]:
    """Describe each image in words. The model is loaded once.

    Args:
        images (`Sequence[str]`): Paths or URLs.
        model (`str`): Folder or Hub name of a chat model.
        max_new_tokens (`int`, defaults to 64): Maximum length of a caption, in tokens.
        device (`str`, *optional*): Device of the model. Defaults to the GPU if there is one, else to the CPU.
        dtype (`str`, *optional*): One of `DTYPES`; `"auto"` keeps the stored dtype. Defaults to float32.

    Returns:
        `list[str]`: One caption per image.

    Raises:
        ValueError: If an image cannot be read, or the device or dtype cannot be used.
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
    """Answer a question about one image, or about several images together.

    Args:
        image (`str` or `Sequence[str]`): One or several paths or URLs.
        question (`str`): The question. Image tokens in it mark the places of the images; without image tokens, the
            images come before it.

    The other arguments and errors are those of [`captions`].

    Returns:
        `str`: The answer.
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
    """Open images. The dtype and all paths are checked first, because these checks are fast."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    for image in images:
        check_image_source(image)
    return [load_image(image) for image in images]


def check_image_source(image: str):
    """Raise [`ImageError`] if the path of an image is not a file. URLs are not checked."""
    if image.startswith(("http://", "https://", "data:image/")) or not image.strip():
        return
    try:
        is_file = os.path.isfile(image)
    except ValueError:
        return
    if not is_file and len(image) < LONGEST_PATH:
        raise ImageError(f"'{image}' is {'a folder' if os.path.isdir(image) else 'missing'}; expected an image file.")


def serve(model: str, host: str, port: int, device: str):
    """Answer HTTP requests, as `transformers serve` does, until an interrupt.

    Args:
        model (`str`): Folder or Hub name of a chat model.
        host (`str`): Address to listen on.
        port (`int`): Port to listen on.
        device (`str`): Device of the model, or `"auto"`.

    Raises:
        ModelError: If the model does not exist, is of another kind, or was trained to generate images.
        ImportError: If the packages of `transformers[serving]` are missing.
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
    """Generate images from a prompt.

    Image i depends only on `seed + i`, except for rounding, whatever the `count`.

    Args:
        prompt (`str`): Description of the image.
        model (`str`): Folder or Hub name of a model that generates images.
        count (`int`, defaults to 1): Number of images.
        seed (`int`, defaults to 0): Seed of the first image.
        jacobi_window (`int`, defaults to 1): Codes per forward pass, by speculative Jacobi decoding.
        sampling: `guidance_scale`, `temperature`, `top_k` and `top_p`. The model's folder gives missing values and
            `None`.

    Returns:
        `list[PIL.Image.Image]`: The images.

    Raises:
        ValueError: If the prompt cannot be used, or prompt and image exceed the model's context.
        ModelError: As for [`load_ett`].
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
    """Encode an image to codes and decode it again. A side above `TILED_ABOVE` pixels is processed in tiles.

    Args:
        image (`str`): Path or URL.
        model (`str`): Folder or Hub name of a tokenizer or an ETT model.
        height (`int`, *optional*): Height in pixels, a multiple of the tokenizer's factor. The image is resized and
            cropped to it. Defaults to the size in the model's folder.
        width (`int`, *optional*): Width in pixels, as for `height`.
        own_size (`bool`, defaults to `False`): Do not resize the image; only crop it to multiples of the factor.

    Returns:
        `tuple[PIL.Image.Image, float]`: The reconstruction, and its PSNR in dB against the tokenizer's input.

    Raises:
        ValueError: If a side is not a multiple of the factor, a side and `own_size` are both given, or the image is
            smaller than a code.
    """
    if own_size and (height or width):
        raise ValueError("Both a size and own_size were given; give either a height and width or own_size.")
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
    """Crop the centre of an image, with the largest sides that are multiples of `factor`."""
    width, height = (side // factor * factor for side in image.size)
    if 0 in (width, height):
        raise ValueError(
            f"The image is {image.height} x {image.width} pixels (height x width); at its own size this "
            f"tokenizer needs at least {factor} x {factor}; give a height and width instead."
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def check_image_path(path: str | os.PathLike, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Path:
    """Check that an image can be written to a path.

    Args:
        path (`str` or `os.PathLike`): The path.
        suffixes (`tuple[str, ...]`, defaults to `IMAGE_SUFFIXES`): Allowed suffixes, in lower case.

    Returns:
        `Path`: The path.

    Raises:
        ValueError: If the suffix is not allowed, the path is a folder, or its parent folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} has no image suffix; expected one of {', '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the image file to write.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} into; create it first.")
    return path


def save_image(image: "Image.Image", path: Path):
    """Write an image to a temporary file and rename it when complete, so an interrupt leaves no partial file."""
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
    """Answer each chat. All chats are checked before the weights are loaded."""
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
