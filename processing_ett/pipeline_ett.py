"""Pipelines of transformers: `pipeline("image-to-text", model=...)("photo.png")`, a caption or an answer, and
`pipeline("any-to-any", model=...)("a red circle", generation_mode="image")`, a drawing."""

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


class ETTImageToTextPipeline(ImageTextToTextPipeline):
    """
    The image-text-to-text pipeline, in which an ETT model also takes a picture without text.

        pipe = pipeline("image-to-text", model="ett-chat")
        pipe("photo.png")                                    # [{"generated_text": "a red circle at the top."}]
        pipe("photo.png", "what color is the circle?")       # [{"generated_text": "red"}]
        pipe(["one.png", "two.png"], batch_size=2)           # one such list for each picture
        for answers in pipe(KeyDataset(photos, "image")):    # or any other iterable of pictures, read as it goes

    Generators and data sets hold pictures. Whatever else it is called with, chats included, and with any other model,
    it is an `ImageTextToTextPipeline`.
    """

    @property
    def dtype(self):
        # The inputs are cast to this. Pixels rounded to a language model's half precision would give other codes.
        return torch.float32 if _is_ett(self.model) else super().dtype

    def __call__(self, images=None, text=None, prompt=None, **kwargs):
        """
        Args:
            images (`str`, `PIL.Image.Image`, or an iterable of them): Paths, URLs or pictures.
            text (`str`, or a list with one for each picture, *optional*): A question or an instruction; by default the
                processor's `caption_prompt`. `prompt` is its name in the image-to-text pipeline of transformers 4.
            kwargs: As of `ImageTextToTextPipeline`, for instance `max_new_tokens`.

        Returns:
            `list[dict]` with the key `generated_text`; for a list of pictures, one such list for each; for a generator
            or a data set an iterator over such lists.

        Raises:
            ImageError: A picture cannot be used.
            TypeError: An iterable holds something else than pictures, for instance the rows of a data set.
            ValueError: `images` and `text` are lists of different lengths.
        """
        text = prompt if text is None else text
        if not _is_ett(self.model) or not (_is_picture(images) or _is_list_of_pictures(images) or _is_stream(images)):
            return super().__call__(images, text, **kwargs)
        kwargs = {"return_full_text": False, **kwargs}
        if _is_stream(images):
            if isinstance(text, (list, tuple)):
                raise ValueError("A generator or a data set of pictures takes one text for all; a list was given.")
            return map(_texts, super().__call__((self._chat(picture, text) for picture in images), **kwargs))
        pictures = images if isinstance(images, (list, tuple)) else [images]
        texts = text if isinstance(text, (list, tuple)) else [text] * len(pictures)
        if len(texts) != len(pictures):
            raise ValueError(f"There are {len(pictures)} pictures and {len(texts)} texts; give each picture one.")
        chats = [self._chat(picture, question) for picture, question in zip(pictures, texts, strict=True)]
        answers = [_texts(group) for group in super().__call__(chats, **kwargs)]
        return answers if pictures is images else answers[0]

    def _chat(self, picture, question: str | None) -> list[dict]:
        if not _is_picture(picture):
            raise TypeError(
                f"Got a {type(picture).__name__} where a picture, its path or URL was expected; of a data set give "
                'the column of its pictures, such as KeyDataset(dataset, "image").'
            )
        question = question or self.processor.caption_prompt
        return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]

    def postprocess(self, model_outputs, **kwargs):
        records = super().postprocess(model_outputs, **kwargs)
        for record in records:
            # The space that a word-level tokenizer sets between prompt and answer.
            if _is_ett(self.model) and isinstance(record.get("generated_text"), str):
                record["generated_text"] = record["generated_text"].lstrip(" ")
        return records


class ETTAnyToAnyPipeline(AnyToAnyPipeline):
    """
    The any-to-any pipeline, in which ETT models draw, too.

        pipe = pipeline("any-to-any", model="ett-gen")
        pipe(text="a red circle", generation_mode="image")   # [{"input_text": ..., "generated_image": <PIL.Image>}]
        pipe(text=chat, return_full_text=False)              # with pictures in it: [{..., "generated_text": "red"}]

    Options of a drawing, such as `guidance_scale` and `num_images_per_prompt`, stand in `generate_kwargs`; limits of a
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
        pixels = self.model.decode_image_tokens(codes).unflatten(0, (len(model_inputs["input_ids"]), -1))
        return {"pixels": pixels, "prompts": prompts}

    def postprocess(self, model_outputs, **kwargs):
        if "pixels" not in model_outputs:
            return super().postprocess(model_outputs, **kwargs)
        prompts = model_outputs["prompts"]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        return [
            {"input_text": getattr(prompt, "messages", prompt), "generated_image": picture}
            for prompt, pixels in zip(prompts, model_outputs["pixels"], strict=True)
            for picture in self.processor.post_process_images(pixels)
        ]


def _is_ett(model: PreTrainedModel) -> bool:
    return model.config.model_type == "ett"


def _is_picture(value) -> bool:
    return isinstance(value, (str, Image.Image, np.ndarray, torch.Tensor))


def _is_list_of_pictures(value) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_picture, value))


def _is_stream(value) -> bool:
    """Whether `value` is a generator, a data set or another iterable that is no list."""
    return value is not None and not (_is_picture(value) or isinstance(value, (list, tuple, dict)))


def _texts(answers: list[dict]) -> list[dict]:
    return [{"generated_text": answer["generated_text"]} for answer in answers]


def register_pipelines() -> None:
    """
    Makes `pipeline("image-to-text", ...)` an [`ETTImageToTextPipeline`] and `pipeline("any-to-any", ...)` an
    [`ETTAnyToAnyPipeline`], for every model.

    transformers 5 turns the name of this removed task into "image-text-to-text" before it looks at what is registered;
    here a registered task comes first. With a model that is not ETT the results are the same as before.
    """
    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK, ETTImageToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
    )
    # Entered by hand: `register_pipeline` would warn that the task exists.
    PIPELINE_REGISTRY.supported_tasks["any-to-any"]["impl"] = ETTAnyToAnyPipeline
    redirect = pipelines._resolve_deprecated_task
    pipelines._resolve_deprecated_task = lambda task: task if task == TASK else redirect(task)


__all__ = ["ETTAnyToAnyPipeline", "ETTImageToTextPipeline", "register_pipelines"]
