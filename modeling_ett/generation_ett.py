"""`generate` of text and of images: options, checks and results. The loop over codes is in `code_loop_ett`."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import ModelOutput

from .code_loop_ett import CodeLoopMixin
from .sampling_ett import CodeSampler

NOT_GENERATED = -1
"""In place of a code where generation was stopped before it."""

IMAGE_SAMPLING = {"do_sample": True, "guidance_scale": 3.0, "temperature": 1.0, "top_k": None, "top_p": 1.0}
"""How codes are sampled where neither a call nor the model's generation configuration says it. The paper names the
filters alone: every code, `top_p` 1 (section 4.3)."""


@dataclass
class ETTImageGenerationOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(num_images, height, width)`): Codes; -1 where generation was stopped.
        scores (`torch.FloatTensor` of shape `(num_images, num_codes, K)`, *optional*): Guided scores of all codes at
            each place, in raster order, before temperature and filters; with `output_scores`.
    """

    sequences: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None


class EndOfContext(StoppingCriteria):
    """Ends answers where the language model's context ends, however many tokens are asked for.

    Args:
        context (`int`): Tokens of prompt and answer together.
    """

    def __init__(self, context: int):
        self.context = context

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        is_done = input_ids.shape[1] >= self.context
        return torch.full((len(input_ids),), is_done, dtype=torch.bool, device=input_ids.device)


def _check_stop_strings(options: dict):
    """Raises `ValueError` where transformers cannot look for stop strings in a tokenizer's texts, as in one of whole
    words."""
    strings = options.get("stop_strings") or getattr(options.get("generation_config"), "stop_strings", None)
    if not strings or options.get("tokenizer") is None:
        return
    try:
        StopStringCriteria(options["tokenizer"], strings)
    except ValueError as error:
        raise ValueError(
            "Stop strings do not work with this model's tokenizer, which has whole words; leave them out."
        ) from error


def _setting(name: str, given: Any, generation_config: GenerationConfig | None) -> Any:
    """What a call says, or else its configuration."""
    return getattr(generation_config, name, None) if given is None else given


class ImageGenerationMixin(CodeLoopMixin):
    """Adds `generation_mode="image"` to `generate` of a model with `model`, `visual_head` and `config`."""

    def require_visual_head(self):
        """Raises `ValueError` where the model cannot generate images."""
        if not self.config.visual_head:
            raise ValueError(
                "This model has no visual head (config.visual_head is false): it reads images but cannot generate "
                "them. Use a generation model such as ETT-Gen."
            )

    def keep_image_sampling(self, **sampling):
        """Sets the model's sampling of images, which `save_pretrained` keeps in `generation_config.json`.

        Args:
            sampling: Values in place of those of `IMAGE_SAMPLING`.
        """
        own = self.generation_config
        tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.generation_config = GenerationConfig(**tokens, **(IMAGE_SAMPLING | sampling))

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        generation_mode: str = "text",
        **kwargs,
    ):
        """
        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt; also as `input_ids`.
            generation_config, logits_processor, stopping_criteria: As in transformers; for images see
                [`~ImageGenerationMixin.generate_image_codes`].
            generation_mode (`"text"` or `"image"`): What to generate.
            kwargs: For text all that [`~transformers.GenerationMixin.generate`] takes; for images see
                [`~ImageGenerationMixin.generate_image_codes`].

        Answers end where the language model's context ends, however many tokens are asked for.

        Returns:
            For text what transformers returns; for images codes of shape `(num_images, height, width)`, or with
            `return_dict_in_generate` an [`ETTImageGenerationOutput`].

        Raises:
            ValueError: The mode is unknown or not one of the model's, a prompt does not fit the context, or it has
                placeholders of images and no images are given.
        """
        if generation_mode not in ("text", "image"):
            raise ValueError(f'generation_mode is {generation_mode!r}; expected "text" or "image".')
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if generation_mode == "image":
            return self.generate_image_codes(
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                **kwargs,
            )
        if not hasattr(kwargs.get("tokenizer"), "get_vocab") and hasattr(kwargs.get("tokenizer"), "tokenizer"):
            # Servers hand the processor on, and stop strings ask its tokenizer for the vocabulary.
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        _check_stop_strings({**kwargs, "generation_config": generation_config})
        if not self.config.answers:
            warnings.warn(
                "This model was trained last to generate images (config.answers is false). "
                "Its answers are unreliable; use a chat model such as ETT-Chat.",
                stacklevel=2,
            )
        if generation_config is None and self.generation_config.guidance_scale is not None:
            # What the folder says of sampling is meant for images.
            kwargs = {"do_sample": False, "guidance_scale": 1.0, **kwargs}
        begins = kwargs.get("cache") is None and kwargs.get("past_key_values") is None
        if begins and kwargs.get("input_ids") is not None:
            self._check_prompts(kwargs["input_ids"], kwargs.get("attention_mask"), kwargs)
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if context is not None:
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), EndOfContext(context)])
        return super().generate(
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            **kwargs,
        )

    @torch.no_grad()
    def generate_image_codes(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: Callable[[torch.LongTensor, torch.FloatTensor], torch.Tensor] | None = None,
        image_size: tuple[int, int] | None = None,
        max_new_tokens: int | None = None,
        return_dict_in_generate: bool | None = None,
        output_scores: bool | None = None,
        **kwargs,
    ) -> torch.LongTensor | ETTImageGenerationOutput:
        """Generates images for prompts, to their ends.

        Args:
            stopping_criteria: As in transformers: is given the codes so far, `(num_images, places)`, and the last
                scores, and returns for each image whether it may stop. When all may, codes that are missing are -1.
            max_new_tokens (`int`, *optional*): Codes of each image; those after them are -1.
            return_dict_in_generate (`bool`, *optional*): Return an [`ETTImageGenerationOutput`].
            output_scores (`bool`, *optional*): Give it the scores of all codes.

        The rest is as in [`~ImageGenerationMixin.stream_image_codes`].

        Returns:
            Codes of shape `(batch_size * num_return_sequences, height, width)` for
            [`~ImageGenerationMixin.decode_image_tokens`].
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
        in_dict = _setting("return_dict_in_generate", return_dict_in_generate, generation_config)
        with_scores = in_dict and _setting("output_scores", output_scores, generation_config)
        height, width = self._code_grid(image_size)
        codes, scores = [], []
        stream = self.stream_image_codes(input_ids, attention_mask, generation_config, image_size=image_size, **kwargs)
        for code, score in stream:
            codes.append(code)
            if with_scores:
                scores.append(score.clone())
            if len(codes) == max_new_tokens:
                break
            if stopping_criteria is not None and bool(stopping_criteria(torch.stack(codes, dim=1), score).all()):
                break
        generated = torch.stack(codes, dim=1)
        sequences = F.pad(generated, (0, height * width - len(codes)), value=NOT_GENERATED).view(-1, height, width)
        if not in_dict:
            return sequences
        return ETTImageGenerationOutput(
            sequences=sequences, scores=torch.stack(scores, dim=1) if with_scores else None
        )

    def stream_image_codes(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        image_size: tuple[int, int] | None = None,
        num_return_sequences: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        jacobi_window: int = 1,
        compile_config: CompileConfig | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        codebook_embeds: torch.FloatTensor | None = None,
        **sampling,
    ) -> Iterator[tuple[torch.LongTensor, torch.FloatTensor]]:
        """Generates images for prompts code by code, in raster order; who stops listening stops the generation.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompts that end with the token
                `config.image_start_token_id`, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 at padding.
            generation_config (`GenerationConfig`, *optional*): By default the model's own, where that is for images.
            logits_processor (`LogitsProcessorList`, *optional*): As in transformers: is given the codes so far and the
                guided scores `(num_images, K)` of the next, and returns other scores.
            image_size (`tuple[int, int]`): Height and width in pixels, multiples of the tokenizer's factor; by default
                `config.image_size` each.
            num_return_sequences (`int`): Images of each prompt, one after the other; 1 by default.
            generator (`torch.Generator` or a list of one an image): Source of randomness, on the model's device or
                the CPU. With a list, an image does not depend on its neighbours in the batch.
            jacobi_window (`int`): Codes scored in one forward pass. Above 1 those after the first are scored by
                guesses of the codes before them, and kept where these prove right (speculative Jacobi decoding, Teng
                et al., 2024). A code's noise stays the same until it is chosen, so the images are those of a window
                of 1, but for rounding.
            compile_config (`CompileConfig`, *optional*): Compile a step by `torch.compile` with these options, over a
                static cache that the model keeps for the next call; with the default options it is one CUDA graph.
            pixel_values, image_codes, codebook_embeds: Images in the prompts, as [`ETTModel`] takes them.
            sampling: In place of what `generation_config` says, or else of `IMAGE_SAMPLING`: `do_sample` (sample, or
                take the best code each time), `guidance_scale` (classifier-free guidance: scores are moved from those
                of the empty prompt by this factor; at 1 the empty prompt is not computed), `temperature`, `top_k` and
                `top_p` (the filters see guided scores divided by the temperature).

        Yields:
            The next code of each image, `(num_images,)`, and the guided scores `(num_images, K)` that it was chosen
            by.

        Raises:
            ValueError: The model has no visual head, a prompt does not end with the image start token or has
                placeholders without images, prompt and image do not fit the context, the size does not fit the
                tokenizer, or an option is unknown or out of range.
        """
        self.require_visual_head()
        height, width = self._code_grid(image_size)
        images = {"pixel_values": pixel_values, "image_codes": image_codes, "codebook_embeds": codebook_embeds}
        self._check_prompts(input_ids, attention_mask, images, height * width)
        num_return_sequences = _setting("num_return_sequences", num_return_sequences, generation_config)
        num_return_sequences = 1 if num_return_sequences is None else num_return_sequences
        sampling = self.image_sampling(generation_config, **sampling)
        guidance_scale = float(sampling.pop("guidance_scale"))
        self._check_start(input_ids, len(input_ids) * num_return_sequences, generator)
        self._check_speed(jacobi_window, compile_config, logits_processor)
        return self._generate_codes(
            height * width,
            width,
            images,
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            num_return_sequences,
            guidance_scale,
            CodeSampler(generator, **sampling),
            logits_processor,
            jacobi_window,
            compile_config,
        )

    def image_sampling(self, generation_config: GenerationConfig | None = None, **given) -> dict[str, Any]:
        """How a call samples images: the values given, or else of the configuration (by default the model's own, where
        that is for images), or else of `IMAGE_SAMPLING`.

        Raises:
            ValueError: An option is unknown or out of range.
        """
        if unknown := sorted(given.keys() - IMAGE_SAMPLING.keys()):
            known = ", ".join(IMAGE_SAMPLING)
            raise ValueError(f"Images are generated without {', '.join(unknown)}; sampling takes {known}.")
        own = self.generation_config
        if generation_config is None and own.guidance_scale is not None:
            # One without guidance is the language model's own, for text.
            generation_config = own
        configured = {name: getattr(generation_config, name, None) for name in IMAGE_SAMPLING}
        sampling = dict(IMAGE_SAMPLING)
        for values in (configured, given):
            sampling.update({name: value for name, value in values.items() if value is not None})
        temperature, top_p, top_k = sampling["temperature"], sampling["top_p"], sampling["top_k"]
        guidance_scale = sampling["guidance_scale"]
        if not (temperature > 0 and 0 < top_p <= 1 and (top_k is None or top_k >= 1) and guidance_scale >= 1):
            raise ValueError(
                f"Got temperature {temperature}, top_p {top_p}, top_k {top_k}, guidance_scale {guidance_scale}; "
                "expected temperature > 0, 0 < top_p <= 1, top_k >= 1 and guidance_scale >= 1."
            )
        return sampling

    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.Tensor:
        """Codes `(batch_size, height, width)` to pixels `(batch_size, 3, H, W)`, clamped to `[-1, 1]`. Where codes are
        -1, not generated yet, images are grey."""
        pixels = self.model.vision_tokenizer.decode_codes(image_tokens.clamp(min=0)).sample.clamp(-1, 1)
        factor = self.model.vision_tokenizer.spatial_factor
        missing = (image_tokens < 0).repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        return pixels.masked_fill(missing.unsqueeze(1).to(pixels.device), 0)

    def _check_prompts(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, given: dict, num_codes: int = 0
    ):
        length = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(dim=1).max())
        self.config.check_context(length, num_codes)
        if all(given.get(name) is None for name in ("pixel_values", "image_codes", "codebook_embeds")):
            placeholders = int((input_ids == self.config.image_token_id).sum())
            if placeholders:
                raise ValueError(
                    f"The prompt has {placeholders} placeholders of images (token {self.config.image_token_id}), "
                    "and no image is given; give pixel_values, as ETTProcessor makes them of images and text."
                )

    def _check_start(
        self, input_ids: torch.LongTensor, num_images: int, generator: torch.Generator | list[torch.Generator] | None
    ):
        if not bool((input_ids[:, -1] == self.config.image_start_token_id).all()):
            raise ValueError(
                f"Each prompt must end with the image start token {self.config.image_start_token_id}; pad on the "
                'left. ETTProcessor(text=..., generation_mode="image") does both.'
            )
        if num_images < 1:
            raise ValueError(
                "There is no image to generate; expected num_return_sequences and prompts to be 1 or more."
            )
        if isinstance(generator, (list, tuple)) and len(generator) != num_images:
            raise ValueError(f"Got {len(generator)} generators for {num_images} images; give one for each.")

    def _check_speed(
        self,
        jacobi_window: int,
        compile_config: CompileConfig | None,
        logits_processor: LogitsProcessorList | None,
    ):
        language_model, cache = self.model.language_model, DynamicCache(config=self.config.text_config)
        name = type(language_model).__name__
        if jacobi_window < 1:
            raise ValueError(f"jacobi_window is {jacobi_window}; expected at least 1.")
        if jacobi_window > 1 and logits_processor is not None:
            raise ValueError(
                f"jacobi_window is {jacobi_window}, and a logits_processor sees the scores of one code at a time; "
                "leave one of them out."
            )
        if jacobi_window > 1 and not cache.is_croppable:
            raise ValueError(
                f"jacobi_window is {jacobi_window}, and the cache of {name} cannot take back wrong guesses; leave "
                "jacobi_window at 1."
            )
        if compile_config is None:
            return
        if not language_model._can_compile_fullgraph or any(cache.is_sliding) or any(cache.is_linear):
            raise ValueError(
                f"compile_config is given, and {name} is not one graph over a static cache of all places; leave "
                "compile_config out."
            )
        if self.config.text_config._attn_implementation == "flex_attention" and self.device.type == "cpu":
            raise ValueError(
                "compile_config is given, and on the CPU flex_attention gives wrong values with a static cache; load "
                'the model with attn_implementation="sdpa".'
            )

    def _code_grid(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        factor = self.model.vision_tokenizer.spatial_factor
        sides = (self.config.image_size, self.config.image_size) if image_size is None else image_size
        is_pair = isinstance(sides, (list, tuple)) and len(sides) == 2
        if not is_pair or not all(isinstance(side, Integral) and side > 0 and side % factor == 0 for side in sides):
            raise ValueError(
                f"image_size is {sides!r}; expected height and width, positive multiples of {factor} pixels."
            )
        height, width = int(sides[0]) // factor, int(sides[1]) // factor
        self.model.check_grid(height, width)
        return height, width


__all__ = ["ETTImageGenerationOutput", "ImageGenerationMixin"]
