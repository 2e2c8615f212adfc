"""One call from images and text to what the model takes, and back from what it gives."""

import copy
import math
import numbers
from collections.abc import Iterator

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, TensorType
from transformers.processing_utils import MultiModalData

from .chat_template_ett import build_chat_template
from .image_processing_ett import ETTImageProcessor, height_and_width, one_sentence
from .text_encoding_ett import (
    TextEncoder,
    begin_once,
    beginning_ids,
    chat_layout,
    choose_padding,
    cut,
    find_end_token,
)
from .word_tokenizer import unknown_words

IMAGE_TOKENS = ("<image>", "<image_start>", "<image_end>")
"""Placeholder, start and end of an image where the tokenizer has none of its own."""

MAX_CODES = 2**16
"""Most codes of an image: as of 4096 x 4096 pixels in the paper's tokenizer."""

CAPTION_PROMPT = "Describe the image."
"""What is asked of an image that comes without text, unless a processor says otherwise."""

QWEN_IMAGE_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")


class ETTProcessor(ProcessorMixin):
    r"""
    Joins an [`ETTImageProcessor`] and a tokenizer; with a vision tokenizer it also turns images into codes or
    embeddings.

    Args:
        image_processor (`ETTImageProcessor`): Its `size` must be a multiple of `spatial_factor`.
        tokenizer (`PreTrainedTokenizerBase`): Must hold the three image tokens. Its padding side is set to the left.
            Its EOS becomes the token that ends an answer in the chat template. Without a padding token it gets one.
        vision_tokenizer (`IBQModel`, *optional*): Needed by `return_codes` and `return_embeddings` only. It is a model
            and never saved with the processor; it may be set and removed as an attribute at any time.
        spatial_factor (`int`, defaults to 16): Pixels a code along each side.
        image_token, image_start_token, image_end_token (`str`): The placeholder, which stands once for each image in
            a text and once for each code in the tokens, and what stands before and after an image.
        caption_prompt (`str`): What is asked of images that come without text.
        chat_template (`str`, *optional*): By default the one of [`build_chat_template`].

    Raises:
        ValueError: The tokenizer lacks an image token, the size does not divide into codes, or a value is of another
            type.
    """

    def __init__(
        self,
        image_processor: ETTImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        vision_tokenizer: torch.nn.Module | None = None,
        spatial_factor: int = 16,
        image_token: str = IMAGE_TOKENS[0],
        image_start_token: str = IMAGE_TOKENS[1],
        image_end_token: str = IMAGE_TOKENS[2],
        caption_prompt: str = CAPTION_PROMPT,
        chat_template: str | None = None,
    ):
        texts = {
            "image_token": image_token,
            "image_start_token": image_start_token,
            "image_end_token": image_end_token,
            "caption_prompt": caption_prompt,
        }
        for name, value in texts.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {value!r:.100}; expected a text.")
        if not isinstance(spatial_factor, numbers.Integral) or isinstance(spatial_factor, bool) or spatial_factor < 1:
            raise ValueError(f"spatial_factor is {spatial_factor!r:.100}; expected a whole number of pixels above 0.")
        self.vision_tokenizer = vision_tokenizer
        self.spatial_factor = spatial_factor
        self.image_token = image_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        self.caption_prompt = caption_prompt
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (image_token, image_start_token, image_end_token) if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer has no token {', '.join(missing)}; ETTProcessor.from_parts adds what is missing."
            )
        self.image_token_id = vocabulary[image_token]
        self.image_start_token_id = vocabulary[image_start_token]
        self.image_end_token_id = vocabulary[image_end_token]
        # Answers and drawings continue from the end of a prompt.
        tokenizer.padding_side = "left"
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or build_chat_template(tokenizer, image_token)
        )
        end_token = find_end_token(tokenizer, self._chat_layout()[1])
        if end_token is not None and end_token != tokenizer.eos_token:
            # Qwen's base models stop at <|endoftext|>, which no answer in ChatML ends with.
            tokenizer.add_special_tokens({"eos_token": end_token})
        choose_padding(tokenizer)
        self.image_placeholder()

    @classmethod
    def from_parts(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        vision_tokenizer: torch.nn.Module | int,
        image_size: int | tuple[int, int] = 512,
        **kwargs,
    ) -> "ETTProcessor":
        """
        A processor for a language model's own text tokenizer.

        Qwen's vision tokens are used where the tokenizer has them; otherwise `<image>`, `<image_start>` and
        `<image_end>` become special tokens of `tokenizer`: the language model must have `len(tokenizer)` embeddings.

        Args:
            vision_tokenizer (`IBQModel` or `int`): The model, which the processor keeps, or only its `spatial_factor`.
            image_size (`int` or `tuple[int, int]`): Pixels along a side, or (height, width).
            kwargs: Further arguments of [`ETTProcessor`].
        """
        tokens = QWEN_IMAGE_TOKENS
        if not set(tokens) <= tokenizer.get_vocab().keys():
            tokens = IMAGE_TOKENS
            tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
        if not isinstance(vision_tokenizer, int):
            kwargs |= {"vision_tokenizer": vision_tokenizer}
            vision_tokenizer = vision_tokenizer.spatial_factor
        return cls(
            ETTImageProcessor(size=image_size),
            tokenizer,
            spatial_factor=vision_tokenizer,
            image_token=tokens[0],
            image_start_token=tokens[1],
            image_end_token=tokens[2],
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "ETTProcessor":
        """
        As in transformers, but for its errors.

        Raises:
            OSError: There is no such folder or repository, or a file is missing in it.
            ValueError: A file is damaged, or a value in it is out of range.
        """
        with one_sentence(f"The processor of '{pretrained_model_name_or_path}'"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The mixin would take `vision_tokenizer` for a text tokenizer, by its name.
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict:
        without_model = copy.copy(self)
        without_model.vision_tokenizer = None
        config = super(ETTProcessor, without_model).to_dict()
        del config["vision_tokenizer"]
        return config

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_codes", "codebook_embeds"]

    def __call__(
        self,
        images=None,
        text=None,
        return_codes: bool = False,
        return_embeddings: bool = False,
        generation_mode: str = "text",
        padding: bool | str = True,
        return_tensors: str | TensorType | None = "pt",
        text_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: An image or a list of them (`PIL.Image.Image`, arrays, tensors, paths), in the order of their
                placeholders; or a list of such lists, one for each text.
            text (`str` or `list[str]`, *optional*): With one `image_token` for each image. Left out, every image,
                or every list of images, is asked `caption_prompt`.
            return_codes, return_embeddings (`bool`): What to return of images instead of pixels; both need a vision
                tokenizer.
            generation_mode (`"text"` or `"image"`): `"image"` ends each text with the image start token, after which
                the model draws.
            padding, return_tensors: As of the tokenizer; here by default padded torch tensors.
            text_kwargs, images_kwargs (`dict`, *optional*): Options of the tokenizer and of the image processor.
            kwargs: Options of either.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` of shape
            `(batch_size, length)`, and for images `pixel_values` `(num_images, 3, H, W)` in `[-1, 1]`, or
            `image_codes` `(num_images, h, w)` of int64, or `codebook_embeds` `(num_images, h * w, dim)`, in raster
            order.

        Raises:
            ImageError: An image cannot be used.
            ValueError: A text is empty; images and placeholders differ in number; a word is beyond a word-level
                vocabulary; a size does not divide into codes; codes are asked for without a vision tokenizer, or with
                one that is not in fp32 or of another spatial factor; `generation_mode` is unknown.
        """
        if generation_mode not in ("text", "image"):
            raise ValueError(f'generation_mode is {generation_mode!r}; expected "text" or "image".')
        if return_codes or return_embeddings:
            self._check_vision_tokenizer()
        images_kwargs = {"return_tensors": return_tensors, **(images_kwargs or {})}
        size = kwargs.pop("size", images_kwargs.pop("size", None))
        if size is not None:
            # Before transformers sees it, whose error is of many lines.
            images_kwargs["size"] = dict(height_and_width(size))
            self.image_placeholder(**images_kwargs["size"])
        if images is not None and not any(_groups(images)):
            images = None
        if images is not None and text is None:
            groups = _groups(images)
            if not all(groups):
                raise ValueError(
                    f"List {list(map(len, groups)).index(0)} of images is empty, and there is no text; give it "
                    "an image, or give texts."
                )
            text = [self._caption_text(len(group)) for group in groups]
        elif text is not None:
            text = list(text) if isinstance(text, (list, tuple)) else [text]
            self.check_prompts(text, generation_mode)
            self._check_placeholders(images, text)
        if text is not None:
            self.check_vocabulary("\n".join(text))
            if generation_mode == "image":
                text = [sample + self.image_start_token for sample in text]
        with_encoder = copy.copy(self)
        with_encoder.tokenizer = TextEncoder(self.tokenizer, self._borders())
        features = super(ETTProcessor, with_encoder).__call__(
            images=images,
            text=text,
            text_kwargs={"padding": padding, "return_tensors": return_tensors, **(text_kwargs or {})},
            images_kwargs=images_kwargs,
            **kwargs,
        )
        if "pixel_values" in features and (return_codes or return_embeddings):
            pixels = features.pop("pixel_values")
            as_tensor = isinstance(pixels, torch.Tensor)
            codes, embeddings = self._tokenize(pixels if as_tensor else torch.from_numpy(np.stack(pixels)))
            chosen = {"image_codes": codes} if return_codes else {}
            chosen |= {"codebook_embeds": embeddings} if return_embeddings else {}
            features.update({name: value if as_tensor else value.numpy() for name, value in chosen.items()})
        return features

    def apply_chat_template(self, conversation, chat_template=None, tools=None, documents=None, **kwargs):
        """
        As in transformers, and what the model would not see is an error.

        Raises:
            ValueError: A part of a message is no text and no image; `tools` or `documents` are given, and the chat
                template has no place for them; the chat template is damaged, or refuses the chat.
        """
        template = str(self.chat_template if chat_template is None else chat_template)
        for name, given in {"tools": tools, "documents": documents}.items():
            if given and name not in template:
                raise ValueError(
                    f"{name} are given, and the model's chat template does not write them; leave {name} out, or give "
                    "a chat_template that does."
                )
        for kind in _kinds_of_parts(conversation):
            if kind not in ("text", "image", "image_url"):
                raise ValueError(f"A message has a part of type {kind!r}; expected parts of type text or image.")
        try:
            return super().apply_chat_template(
                conversation, chat_template=chat_template, tools=tools, documents=documents, **kwargs
            )
        except TemplateError as error:
            raise ValueError(f"The chat template cannot write this chat: {' '.join(str(error).split())}") from error

    def prepare_drawing(self, prompts: str | list[str], **kwargs) -> BatchFeature:
        """
        Inputs of `generate(..., generation_mode="image")`: each prompt ends with the image start token, after which
        the model draws, and is padded on the left.

        Raises:
            ValueError: A prompt is empty, or a word is beyond a word-level vocabulary.
        """
        return self(text=prompts, generation_mode="image", **kwargs)

    def encode_pieces(self, texts: list[str]) -> list[list[int]]:
        """
        Consecutive parts of one text to the token ids that the model sees of them, each placeholder as one token.
        Joined they are the ids of the whole text in a call of the processor, if each part ends where an answer begins
        or ends.

        Args:
            texts (`list[str]`): Parts; the first one gets the tokens that begin a text (BOS).
        """
        pieces = [cut(text, self._borders()) for text in texts]
        flat = [piece for group in pieces for piece in group]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
        ids = [[token for _ in group for token in next(encoded)] for group in pieces]
        if ids:
            joined, beginning = [token for part in ids for token in part], self.beginning_ids
            ids[0] = beginning[: len(begin_once(joined, beginning)) - len(joined)] + ids[0]
        return ids

    def encode_texts(self, texts: list[str]) -> BatchEncoding:
        """
        Texts in which each code of an image has its placeholder already, as evaluation caches them, to `input_ids`
        and `attention_mask` of shape `(batch_size, length)`, padded on the left.
        """
        return TextEncoder(self.tokenizer, self._borders())(texts, padding=True, return_tensors="pt")

    @property
    def beginning_ids(self) -> list[int]:
        """The token ids before every text (BOS), in training and in inference; empty for most tokenizers."""
        return beginning_ids(self.tokenizer)

    @property
    def end_token(self) -> str:
        """The token that ends an answer in training and stops generation: the tokenizer's EOS.

        Raises:
            ValueError: The tokenizer has none.
        """
        if self.tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has no token that ends a text, so a model could not learn to stop; set "
                "tokenizer.eos_token before the processor is made."
            )
        return self.tokenizer.eos_token

    def chat_about(self, image, question: str | None = None) -> list[dict]:
        """
        A chat of one turn for `apply_chat_template`, which shows an image and asks something of it.

        Args:
            image: As in a call of the processor.
            question (`str`, *optional*): By default `caption_prompt`. The image stands where it has `image_token`,
                or else before it.

        Raises:
            ValueError: The question is empty.
        """
        question = self.caption_prompt if question is None else question
        self.check_prompts([question])
        before, _, after = question.rpartition(self.image_token)
        content = [
            {"type": "text", "text": before},
            {"type": "image", "image": image},
            {"type": "text", "text": after},
        ]
        return [{"role": "user", "content": content}]

    def check_prompts(self, prompts: list[str], generation_mode: str = "text"):
        """Raises `ValueError` where one is empty or no text, or there is none."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"A prompt is of type {type(prompt).__name__}; expected a text, or a list of texts.")
        if not prompts or not all(prompt.strip() for prompt in prompts):
            what = "say what to draw" if generation_mode == "image" else "ask or say something"
            raise ValueError(f"The prompt is empty; {what}.")

    def check_vocabulary(self, text: str):
        """Raises `ValueError`, naming them, where `text` has words that a word-level tokenizer does not know."""
        words = unknown_words(self.tokenizer, text)
        if words:
            named = " and ".join(repr(word) for word in words[:3]) + (", among others," if words[3:] else "")
            subject = f"The words {named} are" if words[1:] else f"The word {named} is"
            raise ValueError(
                f"{subject} beyond this model's vocabulary of {len(self.tokenizer)} words; use words that it was "
                "trained on."
            )

    def image_placeholder(self, height: int | None = None, width: int | None = None) -> str:
        """
        What one `image_token` of a text is expanded to, for an image of these sides in pixels (by default the image
        processor's): start token, one placeholder for each code, end token.

        Raises:
            ValueError: As of [`~ETTProcessor.code_grid`].
        """
        height = self.image_processor.size["height"] if height is None else height
        width = self.image_processor.size["width"] if width is None else width
        num_codes = math.prod(self.code_grid((height, width)))
        return self.image_start_token + self.image_token * num_codes + self.image_end_token

    def code_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """
        Rows and columns of codes of an image of a height and width in pixels.

        Raises:
            ValueError: It is no height and width, a side is no positive multiple of `spatial_factor`, or an image of
                this size has too many codes.
        """
        factor = self.spatial_factor
        if not isinstance(image_size, (list, tuple)) or len(image_size) != 2:
            raise ValueError(f"An image's size is {image_size!r}; expected its height and width in pixels.")
        if not all(isinstance(side, numbers.Integral) and side > 0 and side % factor == 0 for side in image_size):
            raise ValueError(
                f"Images of {image_size[0]!r} x {image_size[1]!r} pixels (height x width) do not divide into codes "
                f"of {factor} pixels a side; choose positive, whole multiples of it."
            )
        rows, columns = image_size[0] // factor, image_size[1] // factor
        if rows * columns > MAX_CODES:
            raise ValueError(
                f"Images of {image_size[0]} x {image_size[1]} pixels (height x width) have {rows * columns} codes; "
                f"expected at most {MAX_CODES}, so choose a smaller size."
            )
        return rows, columns

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_placeholder(*image_inputs["pixel_values"][image_idx].shape[-2:])

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """What engines reserve for images.

        Args:
            image_sizes (`list[list[int]]`, *optional*): Heights and widths of images in pixels, which become the image
                processor's size.
            kwargs: Of the image processor, such as `size`.
        """
        if image_sizes is None:
            return MultiModalData()
        size = kwargs.get("size", self.image_processor.size)
        num_codes = math.prod(self.code_grid((size["height"], size["width"])))
        number = len(image_sizes)
        return MultiModalData(num_image_tokens=[num_codes] * number, num_image_patches=[1] * number)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """Token ids `(batch_size, length)` to one text each."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_images(self, pixels: torch.Tensor) -> list[Image.Image]:
        """Pixels `(batch_size, 3, H, W)`, nominally in `[-1, 1]`, to images."""
        return self.image_processor.post_process(pixels)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[Image.Image]:
        """Token ids to texts, or with `generation_mode="image"` pixels to images."""
        if generation_mode == "image":
            return self.post_process_images(generated_outputs)
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )

    def _chat_layout(self) -> tuple[str, str]:
        template = self.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        named = self.tokenizer.special_tokens_map.items()
        tokens = tuple((name, str(token)) for name, token in named if not isinstance(token, (list, tuple)))
        return chat_layout(template, tokens) if isinstance(template, str) else ("", "")

    def _borders(self) -> tuple[str, ...]:
        """The texts after which an answer begins, and the token that ends one."""
        return self._chat_layout()[0], self.tokenizer.eos_token or ""

    def _caption_text(self, num_images: int) -> str:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": self.caption_prompt}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _check_placeholders(self, images, text: list[str]):
        counts = [sample.count(self.image_token) for sample in text]
        groups = [] if images is None else _groups(images)
        if not _is_nested(images):
            if sum(counts) != len(groups):
                raise ValueError(
                    f"The text has {sum(counts)} {self.image_token} and there are {len(groups)} images; give one "
                    "image for each."
                )
            return
        if len(groups) != len(text):
            raise ValueError(f"There are {len(groups)} lists of images and {len(text)} texts; give each text one.")
        for index, (group, count) in enumerate(zip(groups, counts, strict=True)):
            if count != len(group):
                raise ValueError(
                    f"Text {index} has {count} {self.image_token} and {len(group)} images; give one image for each."
                )

    def _check_vision_tokenizer(self):
        if self.vision_tokenizer is None:
            raise ValueError(
                "Codes and embeddings are made by a vision tokenizer, and this processor has none; set "
                "processor.vision_tokenizer, for instance to model.model.vision_tokenizer."
            )
        if self.vision_tokenizer.spatial_factor != self.spatial_factor:
            raise ValueError(
                f"The vision tokenizer has codes of {self.vision_tokenizer.spatial_factor} pixels a side and this "
                f"processor expects {self.spatial_factor}; they belong to different models."
            )
        if self.vision_tokenizer.dtype != torch.float32:
            raise ValueError(
                f"The vision tokenizer is in {self.vision_tokenizer.dtype}, in which codes flip; call .float() on it."
            )

    @torch.no_grad()
    def _tokenize(self, pixels: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        codes = self.vision_tokenizer.encode_codes(pixels)
        embeddings = self.vision_tokenizer.codes_to_embeddings(codes)
        return codes.cpu(), embeddings.flatten(2).transpose(1, 2).contiguous().cpu()


def _kinds_of_parts(conversation) -> Iterator[str]:
    """The types of the parts of all messages in a chat, or in a list of chats."""
    for entry in getattr(conversation, "messages", conversation):
        if isinstance(entry, (list, tuple)) or hasattr(entry, "messages"):
            yield from _kinds_of_parts(entry)
        elif isinstance(entry, dict) and isinstance(entry.get("content"), list):
            yield from (part.get("type") for part in entry["content"] if isinstance(part, dict))


def _is_nested(images) -> bool:
    return isinstance(images, (list, tuple)) and len(images) > 0 and isinstance(images[0], (list, tuple))


def _groups(images) -> list:
    """The images of each sample, where every image that stands alone is a sample."""
    if _is_nested(images):
        return list(images)
    is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
    return [[image] for image in images] if is_batch else [[images]]


__all__ = ["ETTProcessor"]
