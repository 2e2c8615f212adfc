"""Pipelines of transformers: `pipeline("image-to-text", model=...)("photo.png")`, a caption or an answer, and
`pipeline("any-to-any", model=...)("a red circle", generation_mode="image")`, a drawing."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AnyToAnyPipeline,
    AutoModelForImageTextToText,
    ImageTextToTextPipeline,
    PreTrainedModel,
    pipelines,
)
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "image-to-text"
TEXT_OPTIONS = ("generation_config", "max_new_tokens", "stop_strings", "tokenizer")
"""Options of `generate` that the any-to-any pipeline adds, and that say nothing about a drawing."""


class _CheckedInputs:
    """What the pipelines have in common: of an ETT model's input they say what is wrong before the model works."""

    @property
    def dtype(self):
        # The inputs are cast to this. Pixels rounded to a language model's half precision would give other codes.
        return torch.float32 if _is_ett(self.model) else super().dtype

    def __call__(self, *args, **kwargs):
        if _is_ett(self.model) and any(map(_has_empty_list, (*args, kwargs.get("text")))):
            raise ValueError("An empty list was given; fill it with images, texts or a chat's messages.")
        return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the pipeline's model, and of an ETT model the processor beside it, which transformers leaves out."""
        super().save_pretrained(save_directory, **kwargs)
        if _is_ett(self.model) and self.processor is not None:
            self.processor.save_pretrained(save_directory)

    def preprocess(self, inputs=None, **kwargs):
        messages = getattr(inputs, "messages", None)
        if _is_ett(self.model) and messages and _is_blank(messages[-1]["content"]):
            raise ValueError("The last message of the chat is empty; say something in it, or show an image.")
        return super().preprocess(inputs, **kwargs)


class ETTImageTextToTextPipeline(_CheckedInputs, ImageTextToTextPipeline):
    """
    The image-text-to-text pipeline, in which an ETT model's images are opened as everywhere else in ETT: with limits
    of their size and of the time that a URL takes, in every mode of colour, over white.

        pipe = pipeline("image-text-to-text", model="ett-chat")
        pipe(text=chat, return_full_text=False)              # [{"input_text": ..., "generated_text": "red"}]
        pipe("photo.png", f"{pipe.processor.image_token} a photo of")  # goes on with the text

    With any other model it is an `ImageTextToTextPipeline`.
    """

    def __call__(self, images=None, text=None, **kwargs):
        if _is_ett(self.model) and text is None and (_is_image(images) or _is_list_of_images(images)):
            raise ValueError(
                'Images were given without a text; give one, or use pipeline("image-to-text"), which describes them.'
            )
        return super().__call__(images, text, **kwargs)

    def preprocess(self, inputs=None, timeout=None, continue_final_message=None, processor_kwargs=None, **kwargs):
        if _is_ett(self.model) and isinstance(inputs, dict):
            options = kwargs if processor_kwargs is None else processor_kwargs
            text = inputs.get("text") or []
            return self.processor(images=inputs.get("images"), text=text, **options) | {"text": text}
        return super().preprocess(
            inputs,
            timeout=timeout,
            continue_final_message=continue_final_message,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )


class ETTImageToTextPipeline(ETTImageTextToTextPipeline):
    """
    The image-text-to-text pipeline, in which an ETT model also takes an image without text.

        pipe = pipeline("image-to-text", model="ett-chat")
        pipe("photo.png")                                    # [{"generated_text": "a red circle at the top."}]
        pipe("photo.png", "what color is the circle?")       # [{"generated_text": "red"}]
        pipe(["one.png", "two.png"], batch_size=2)           # one such list for each image
        for answers in pipe(KeyDataset(photos, "image")):    # or any other iterable of images, read as it goes

    Generators and datasets hold images. Called with chats, and with any other model, it is an
    `ImageTextToTextPipeline`.
    """

    def __call__(self, images=None, text=None, prompt=None, **kwargs):
        """
        Args:
            images (`str`, `Path`, `PIL.Image.Image`, array, tensor, or an iterable of them): Paths, URLs or images.
            text (`str`, or a list with one for each image, *optional*): A question or an instruction; by default the
                processor's `caption_prompt`. `prompt` is its name in the image-to-text pipeline of transformers 4.
            kwargs: As of `ImageTextToTextPipeline`, for instance `max_new_tokens`.

        Returns:
            `list[dict]` with the key `generated_text`; for a list of images, one such list for each; for a generator
            or a dataset an iterator over such lists.

        Raises:
            ImageError: An image cannot be used.
            TypeError: Something else than images is given, for instance the rows of a dataset.
            ValueError: There is no image, `images` and `text` are lists of different lengths, or a question is
                empty or longer than the language model's context.
        """
        text = prompt if text is None else text
        if not _is_ett(self.model) or _is_chat(images) or _is_chat(text):
            return super().__call__(images, text, **kwargs)
        if images is None or _has_empty_list(images):
            raise ValueError("There is no image; image-to-text needs one, as a path, URL or opened image.")
        kwargs = {"return_full_text": False, **kwargs}
        if _is_stream(images):
            if isinstance(text, (list, tuple)):
                raise ValueError("A generator or a dataset of images takes one text for all; a list was given.")
            return map(_texts, super().__call__((self._chat(image, text) for image in images), **kwargs))
        each = images if isinstance(images, (list, tuple)) else [images]
        texts = text if isinstance(text, (list, tuple)) else [text] * len(each)
        if len(texts) != len(each):
            raise ValueError(f"There are {len(each)} images and {len(texts)} texts; give each image one.")
        chats = [self._chat(image, question) for image, question in zip(each, texts, strict=True)]
        answers = [_texts(group) for group in super().__call__(chats, **kwargs)]
        return answers if each is images else answers[0]

    def _chat(self, image, question: str | None) -> list[dict]:
        if not _is_image(image):
            raise TypeError(
                f"Got a value of type {type(image).__name__}; expected an image, its path or URL, or of a dataset "
                'the column of its images, such as KeyDataset(dataset, "image").'
            )
        return self.processor.chat_about(image, question)

    def postprocess(self, model_outputs, **kwargs):
        records = super().postprocess(model_outputs, **kwargs)
        for record in records:
            # The space that a word-level tokenizer sets between prompt and answer.
            if _is_ett(self.model) and isinstance(record.get("generated_text"), str):
                record["generated_text"] = record["generated_text"].lstrip(" ")
        return records


class ETTAnyToAnyPipeline(_CheckedInputs, AnyToAnyPipeline):
    """
    The any-to-any pipeline, in which ETT models draw, too.

        pipe = pipeline("any-to-any", model="ett-gen")
        pipe(text="a red circle", generation_mode="image")   # [{"input_text": ..., "generated_image": <PIL.Image>}]
        pipe(text=chat, return_full_text=False)              # with images in it: [{..., "generated_text": "red"}]

    Options of a drawing, such as `guidance_scale` and `num_return_sequences`, stand in `generate_kwargs`; limits of a
    text, such as `max_new_tokens`, say nothing about one. With any other model it is an `AnyToAnyPipeline`.
    """

    def _sanitize_parameters(self, generation_mode=None, processor_kwargs=None, **kwargs):
        if generation_mode == "image" and _is_ett(self.model):
            self.model.require_visual_head()
            processor_kwargs = {**(processor_kwargs or {}), "generation_mode": "image"}
        return super()._sanitize_parameters(
            generation_mode=generation_mode, processor_kwargs=processor_kwargs, **kwargs
        )

    def _forward(self, model_inputs, generate_kwargs=None):
        generate_kwargs = generate_kwargs or {}
        if generate_kwargs.get("generation_mode") != "image" or not _is_ett(self.model):
            return super()._forward(model_inputs, generate_kwargs)
        prompts = model_inputs.pop("text")
        options = {name: value for name, value in generate_kwargs.items() if name not in TEXT_OPTIONS}
        codes = self.model.generate(**model_inputs, **options)
        codes = getattr(codes, "sequences", codes)
        pixels = self.model.decode_image_tokens(codes).unflatten(0, (len(model_inputs["input_ids"]), -1))
        return {"pixels": pixels, "prompts": prompts}

    def postprocess(self, model_outputs, **kwargs):
        if "pixels" not in model_outputs:
            return super().postprocess(model_outputs, **kwargs)
        prompts = model_outputs["prompts"]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        return [
            {"input_text": getattr(prompt, "messages", prompt), "generated_image": image}
            for prompt, pixels in zip(prompts, model_outputs["pixels"], strict=True)
            for image in self.processor.post_process_images(pixels)
        ]


def _is_ett(model: PreTrainedModel) -> bool:
    return model.config.model_type == "ett"


def _is_image(value) -> bool:
    return isinstance(value, (str, bytes, Path, Image.Image, np.ndarray, torch.Tensor))


def _is_list_of_images(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_image, value))


def _is_stream(value) -> bool:
    """Whether `value` is a generator, a dataset or another iterable that is no list."""
    is_iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return is_iterable and not (_is_image(value) or isinstance(value, (list, tuple, dict)))


def _is_chat(value) -> bool:
    """Whether `value` holds messages, or texts and images in a dict."""
    return isinstance(value, dict) or (isinstance(value, (list, tuple)) and any(map(_is_chat, value)))


def _has_empty_list(value) -> bool:
    return isinstance(value, (list, tuple)) and (not value or any(map(_has_empty_list, value)))


def _is_blank(content) -> bool:
    """Whether the content of a message is no image, and no text but white space."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return all(part["type"] == "text" and not (part["text"] or "").strip() for part in parts)


def _texts(answers: list[dict]) -> list[dict]:
    return [{"generated_text": answer["generated_text"]} for answer in answers]


def register_pipelines() -> None:
    """
    Makes `pipeline("image-to-text", ...)` an [`ETTImageToTextPipeline`], `pipeline("image-text-to-text", ...)` an
    [`ETTImageTextToTextPipeline`] and `pipeline("any-to-any", ...)` an [`ETTAnyToAnyPipeline`], for every model.

    transformers 5 turns the name of this removed task into "image-text-to-text" before it looks at what is registered;
    here a registered task comes first. With a model that is not ETT the results are the same as before.
    """
    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK, ETTImageToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
    )
    # Entered by hand: `register_pipeline` would warn that the tasks exist.
    PIPELINE_REGISTRY.supported_tasks["image-text-to-text"]["impl"] = ETTImageTextToTextPipeline
    PIPELINE_REGISTRY.supported_tasks["any-to-any"]["impl"] = ETTAnyToAnyPipeline
    redirect = pipelines._resolve_deprecated_task
    pipelines._resolve_deprecated_task = lambda task: task if task == TASK else redirect(task)


__all__ = ["ETTAnyToAnyPipeline", "ETTImageTextToTextPipeline", "ETTImageToTextPipeline", "register_pipelines"]
