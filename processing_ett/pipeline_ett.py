"""`pipeline("image-to-text", model=...)("photo.png")`: a caption, or with a prompt an answer."""

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, ImageTextToTextPipeline, pipelines
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "image-to-text"


class ETTImageToTextPipeline(ImageTextToTextPipeline):
    """
    The image-text-to-text pipeline, in which an ETT model also takes a picture without text.

        pipe = pipeline("image-to-text", model="ett-chat")
        pipe("photo.png")                                    # [{"generated_text": "a red circle at the top."}]
        pipe("photo.png", "what color is the circle?")       # [{"generated_text": "red"}]
        pipe(["one.png", "two.png"], batch_size=2)           # one such list for each picture

    Whatever else it is called with, chats included, and with any other model, it is an `ImageTextToTextPipeline`.
    """

    @property
    def _has_ett(self) -> bool:
        return self.model.config.model_type == "ett"

    @property
    def dtype(self):
        # The inputs are cast to this. Pixels rounded to a language model's half precision would give other codes.
        return torch.float32 if self._has_ett else super().dtype

    def __call__(self, images=None, text=None, prompt=None, **kwargs):
        """
        Args:
            images (`str`, `PIL.Image.Image` or a list of them): Paths, URLs or pictures.
            text (`str`, or a list with one for each picture, *optional*): A question or an instruction; by default the
                processor's `caption_prompt`. `prompt` is its name in the image-to-text pipeline of transformers 4.
            kwargs: As of `ImageTextToTextPipeline`, for instance `max_new_tokens`.

        Returns:
            `list[dict]` with the key `generated_text`; for a list of pictures, one such list for each.

        Raises:
            ImageError: A picture cannot be used.
            ValueError: `images` and `text` are lists of different lengths.
        """
        text = prompt if text is None else text
        pictures = images if isinstance(images, list) else [images]
        if not (self._has_ett and all(isinstance(picture, (str, Image.Image)) for picture in pictures)):
            return super().__call__(images, text, **kwargs)
        texts = text if isinstance(text, list) else [text or self.processor.caption_prompt] * len(pictures)
        if len(texts) != len(pictures):
            raise ValueError(f"There are {len(pictures)} pictures and {len(texts)} texts; give each picture one.")
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
            for picture, question in zip(pictures, texts, strict=True)
        ]
        answers = super().__call__(text=chats, **{"return_full_text": False, **kwargs})
        answers = [[{"generated_text": answer["generated_text"]} for answer in group] for group in answers]
        return answers if isinstance(images, list) else answers[0]

    def postprocess(self, model_outputs, **kwargs):
        records = super().postprocess(model_outputs, **kwargs)
        for record in records:
            # The space that a word-level tokenizer sets between prompt and answer.
            if self._has_ett and isinstance(record.get("generated_text"), str):
                record["generated_text"] = record["generated_text"].lstrip(" ")
        return records


def register_pipelines() -> None:
    """
    Makes `pipeline("image-to-text", ...)` an [`ETTImageToTextPipeline`], for every model.

    transformers 5 turns the name of this removed task into "image-text-to-text" before it looks at what is registered;
    here a registered task comes first. With a model that is not ETT the result is the same as before.
    """
    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK, ETTImageToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
    )
    redirect = pipelines._resolve_deprecated_task
    pipelines._resolve_deprecated_task = lambda task: task if task == TASK else redirect(task)


__all__ = ["ETTImageToTextPipeline", "register_pipelines"]
