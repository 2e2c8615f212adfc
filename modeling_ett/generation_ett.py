"""Drawing: the loop that samples a picture's codes one after another, and the choice between text and pictures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import ModelOutput

from .sampling_ett import CodeSampler

_STATIC_CACHES: WeakKeyDictionary[torch.nn.Module, StaticCache] = WeakKeyDictionary()

NOT_DRAWN = -1
"""In place of a code where drawing was stopped before it."""


@dataclass
class ETTImageGenerationOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, height, width)`): Codes; -1 where drawing was stopped.
        scores (`torch.FloatTensor` of shape `(batch_size, num_codes, K)`): Guided scores of all codes at each place
            that was drawn, in raster order, before temperature and filters.
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


class ImageGenerationMixin:
    """Adds `generation_mode="image"` to `generate` of a model with `model`, `visual_head` and `config`."""

    def require_visual_head(self):
        """Raises `ValueError` where the model cannot draw."""
        if not self.config.visual_head:
            raise ValueError(
                "This model has no visual head (config.visual_head is false): it reads pictures but cannot draw them. "
                "Use a generation model such as ETT-Gen."
            )

    def require_answers(self):
        """Raises `ValueError` where the model was trained to draw."""
        if not self.config.answers:
            raise ValueError(
                "This model was trained to draw and not to answer (config.answers is false). Use a chat model such as "
                "ETT-Chat, or set config.answers to true to have it answer nevertheless."
            )

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, generation_mode: str = "text", **kwargs):
        """
        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt; also as `input_ids`.
            generation_mode (`"text"` or `"image"`): What to generate.
            kwargs: For text all that [`~transformers.GenerationMixin.generate`] takes; for pictures see
                [`~ImageGenerationMixin.generate_image_codes`].

        Answers end where the language model's context ends, however many tokens are asked for.

        Returns:
            For text what transformers returns; for pictures codes of shape `(batch_size, height, width)`.

        Raises:
            ValueError: The mode is unknown or not one of the model's, a prompt does not fit the context, or it has
                placeholders of pictures and no pictures are given.
        """
        if generation_mode not in ("text", "image"):
            raise ValueError(f'generation_mode is {generation_mode!r}; expected "text" or "image".')
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if generation_mode == "image":
            return self.generate_image_codes(**kwargs)
        if not hasattr(kwargs.get("tokenizer"), "get_vocab") and hasattr(kwargs.get("tokenizer"), "tokenizer"):
            # Servers hand the processor on, and stop strings ask its tokenizer for the vocabulary.
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        _check_stop_strings(kwargs)
        self.require_answers()
        begins = kwargs.get("cache") is None and kwargs.get("past_key_values") is None
        if begins and kwargs.get("input_ids") is not None:
            self._check_prompts(kwargs["input_ids"], kwargs.get("attention_mask"), kwargs)
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if context is not None:
            criteria = [*(kwargs.get("stopping_criteria") or ()), EndOfContext(context)]
            kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
        return super().generate(**kwargs)

    @torch.no_grad()
    def generate_image_codes(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        output_scores: bool = False,
        stopping_criteria: Callable[[torch.LongTensor, torch.FloatTensor], torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.LongTensor | ETTImageGenerationOutput:
        """Draws pictures for prompts, to their ends.

        Args:
            output_scores (`bool`): Return [`ETTImageGenerationOutput`], with the scores of all codes.
            stopping_criteria: As in transformers: is given the codes so far, `(num_pictures, places)`, and the last
                scores, and returns for each picture whether it may stop. When all may, codes that are missing are -1.

        The rest is as in [`~ImageGenerationMixin.stream_image_codes`].

        Returns:
            Codes of shape `(batch_size * num_images_per_prompt, height, width)` for
            [`~ImageGenerationMixin.decode_image_tokens`].
        """
        height, width = self._code_grid(image_size)
        codes, scores = [], []
        for code, score in self.stream_image_codes(input_ids, attention_mask, image_size, **kwargs):
            codes.append(code)
            if output_scores:
                scores.append(score.clone())
            if stopping_criteria is not None and bool(stopping_criteria(torch.stack(codes, dim=1), score).all()):
                break
        drawn = torch.stack(codes, dim=1)
        sequences = F.pad(drawn, (0, height * width - len(codes)), value=NOT_DRAWN).view(-1, height, width)
        if not output_scores:
            return sequences
        return ETTImageGenerationOutput(sequences=sequences, scores=torch.stack(scores, dim=1))

    def stream_image_codes(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 3.0,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        jacobi_window: int = 1,
        compile_config: CompileConfig | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        codebook_embeds: torch.FloatTensor | None = None,
    ) -> Iterator[tuple[torch.LongTensor, torch.FloatTensor]]:
        """Draws pictures for prompts code by code, in raster order; who stops listening stops the drawing. The paper's
        `top_k` and `top_p` (section 4.3) are the defaults: every code, `top_p` 1. It names no guidance scale.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompts that end with the token
                `config.image_start_token_id`, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 at padding.
            image_size (`tuple[int, int]`): Height and width in pixels, multiples of the tokenizer's factor; by default
                `config.image_size` each.
            num_images_per_prompt (`int`): Pictures of each prompt, one after the other.
            guidance_scale (`float`): Classifier-free guidance: scores are moved from those of the empty prompt by this
                factor. At 1 the empty prompt is not computed.
            do_sample (`bool`): Sample, or take the best code each time.
            temperature, top_k, top_p: Sampling; the filters see guided scores divided by the temperature.
            generator (`torch.Generator` or a list of one a picture): Source of randomness, on the model's device or
                the CPU. With a list, a picture does not depend on its neighbours in the batch.
            jacobi_window (`int`): Codes scored in one forward pass. Above 1 those after the first are scored by
                guesses of the codes before them, and kept where these prove right (speculative Jacobi decoding, Teng
                et al., 2024). A code's noise stays the same until it is drawn, so the pictures are those of a window
                of 1, but for rounding.
            compile_config (`CompileConfig`, *optional*): Compile a step by `torch.compile` with these options, over a
                static cache that the model keeps for the next drawing; with the default options it is one CUDA graph.
            pixel_values, image_codes, codebook_embeds: Pictures in the prompts, as [`ETTModel`] takes them.

        Yields:
            The next code of each picture, `(num_pictures,)`, and the guided scores `(num_pictures, K)` that it was
            chosen by.

        Raises:
            ValueError: The model has no visual head, a prompt does not end with the image start token or has
                placeholders without pictures, prompt and picture do not fit the context, the size does not fit the
                tokenizer, or an option is out of range.
        """
        self.require_visual_head()
        height, width = self._code_grid(image_size)
        pictures = {"pixel_values": pixel_values, "image_codes": image_codes, "codebook_embeds": codebook_embeds}
        self._check_prompts(input_ids, attention_mask, pictures, height * width)
        num_pictures = len(input_ids) * num_images_per_prompt
        self._check_drawing(input_ids, num_pictures, generator, temperature, top_k, top_p, guidance_scale)
        self._check_speed(jacobi_window, compile_config)
        return self._draw(
            height * width,
            width,
            pictures,
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            num_images_per_prompt,
            float(guidance_scale),
            CodeSampler(generator, do_sample, temperature, top_k, top_p),
            jacobi_window,
            compile_config,
        )

    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.Tensor:
        """Codes `(batch_size, height, width)` to pixels `(batch_size, 3, H, W)`, clamped to `[-1, 1]`. Where codes are
        -1, not drawn yet, pictures are grey."""
        pixels = self.model.vision_tokenizer.decode_codes(image_tokens.clamp(min=0)).sample.clamp(-1, 1)
        factor = self.model.vision_tokenizer.spatial_factor
        missing = (image_tokens < 0).repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        return pixels.masked_fill(missing.unsqueeze(1).to(pixels.device), 0)

    @torch.no_grad()
    def _draw(
        self,
        num_codes: int,
        width: int,
        pictures: dict[str, torch.Tensor | None],
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        num_images_per_prompt: int,
        guidance_scale: float,
        choose: CodeSampler,
        jacobi_window: int,
        compile_config: CompileConfig | None,
    ) -> Iterator[tuple[torch.LongTensor, torch.FloatTensor]]:
        num_prompts, prompt_length = input_ids.shape
        num_pictures = num_prompts * num_images_per_prompt
        rows = torch.arange(num_prompts, device=input_ids.device).repeat_interleave(num_images_per_prompt)
        if guidance_scale > 1:
            empty, empty_mask = self._empty_prompt(input_ids, attention_mask)
            input_ids = torch.cat([input_ids, empty])
            attention_mask = torch.cat([attention_mask, empty_mask])
            rows = torch.cat([rows, torch.full_like(rows, num_prompts)])
        cache = DynamicCache(config=self.config.text_config)
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden_states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
            **pictures,
        ).last_hidden_state[:, -1:]
        hidden_states = hidden_states[rows.to(hidden_states.device)]
        num_places = num_codes + jacobi_window - 1
        attention_mask = F.pad(attention_mask[rows], (0, num_places), value=1)
        position_ids = position_ids[rows, -1:] + torch.arange(1, jacobi_window + 1, device=rows.device)
        # Guesses beyond the picture are scored, too, and there the context may have ended.
        last_position = position_ids[:, :1] + num_codes - 2
        if compile_config is None:
            step = self._step
            cache.reorder_cache(rows)
            if jacobi_window > 1:
                cache.activate_past_recording()
        else:
            step = self._compiled_step(compile_config)
            cache = self._static_cache(cache, rows, attention_mask.shape[1])
        scores = self._guided_scores(hidden_states, guidance_scale)
        codes, drawn = torch.zeros(num_pictures, num_places, dtype=torch.long, device=scores.device), 0
        while True:
            scores = scores[:, : num_codes - drawn]
            chosen, right = choose(scores, drawn), 1
            places = slice(drawn, drawn + scores.shape[1])
            if scores.shape[1] > 1:
                # A code is final if all before it were scored by what was then chosen there.
                agree = (chosen == codes[:, places])[:, :-1].all(dim=0)
                right += int(agree.long().cumprod(dim=0).sum())
            codes[:, places] = chosen
            for place in range(right):
                yield chosen[:, place], scores[:, place]
            drawn += right
            if drawn == num_codes:
                if compile_config is not None:
                    _STATIC_CACHES[self] = cache
                return
            if jacobi_window > 1 and places.start > 0:
                cache.crop(right - jacobi_window)
            for place in range(places.stop, drawn + jacobi_window - 1):
                # A first guess is the code above.
                codes[:, place] = codes[:, max(place - width, 0)]
            seen = slice(drawn - 1, drawn - 1 + jacobi_window)
            scores = step(
                codes[:, seen],
                torch.arange(seen.start, seen.stop, device=codes.device),
                width,
                attention_mask if compile_config else attention_mask[:, : prompt_length + seen.stop],
                torch.minimum(position_ids + seen.start, last_position),
                cache,
                guidance_scale,
            )

    def _empty_prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Ids and mask `(1, sequence_length)` of the empty prompt, padded on the left: the image start token, after
        BOS where each of the prompts begins with BOS, as in training."""
        bos = self.generation_config.bos_token_id
        if bos is None:
            bos = getattr(self.config.text_config, "bos_token_id", None)
        empty = torch.full_like(input_ids[:1], self.config.image_start_token_id)
        empty_mask = torch.zeros_like(attention_mask[:1])
        empty_mask[:, -1] = 1
        first = input_ids.gather(1, attention_mask.long().argmax(dim=1, keepdim=True))
        if isinstance(bos, int) and input_ids.shape[1] > 1 and bool((first == bos).all()):
            empty[:, -2], empty_mask[:, -2] = bos, 1
        return empty, empty_mask

    def _step(
        self,
        codes: torch.LongTensor,
        places: torch.LongTensor,
        width: int,
        attention_mask: torch.Tensor,
        position_ids: torch.LongTensor,
        cache: Cache,
        guidance_scale: float,
    ) -> torch.FloatTensor:
        """Codes `(num_pictures, num_places)`, at `places` in images of `width` codes a row, to guided scores
        `(num_pictures, num_places, K)` of what follows each."""
        codes = codes.repeat(2, 1) if guidance_scale > 1 else codes
        dtype = self.get_input_embeddings().weight.dtype
        hidden_states = self.model(
            inputs_embeds=self.model.embed_codes(codes, places, width).to(dtype),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        return self._guided_scores(hidden_states, guidance_scale)

    def _guided_scores(self, hidden_states: torch.Tensor, guidance_scale: float) -> torch.FloatTensor:
        scores = self.visual_head(hidden_states).float()
        if guidance_scale == 1:
            return scores
        conditional, empty = scores.chunk(2)
        return empty + guidance_scale * (conditional - empty)

    def _compiled_step(self, compile_config: CompileConfig) -> Callable[..., torch.FloatTensor]:
        compiled = torch.compile(self._step, **compile_config.to_dict())

        def step(*args) -> torch.FloatTensor:
            # The next replay of a CUDA graph writes where this one's scores are.
            return compiled(*args).clone()

        return step

    def _static_cache(self, cache: DynamicCache, rows: torch.LongTensor, length: int) -> StaticCache:
        """The rows of a cache in one of fixed addresses: that of the model's last drawing, so that its graph may be
        replayed, or a new one where that has another shape or is in use."""
        keys, static = cache.layers[0].keys, _STATIC_CACHES.pop(self, None)
        if static is not None:
            old = static.layers[0].keys
            same_shape = old.shape == (len(rows), keys.shape[1], length, keys.shape[3])
            static = static if same_shape and (old.dtype, old.device) == (keys.dtype, keys.device) else None
        if static is None:
            static = StaticCache(config=self.config.text_config, max_cache_len=length)
        static.reset()
        for index, layer in enumerate(cache.layers):
            own = rows.to(layer.keys.device)
            static.update(layer.keys[own], layer.values[own], index)
        return static

    def _check_prompts(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, given: dict, num_codes: int = 0
    ):
        length = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(dim=1).max())
        self.config.check_context(length, num_codes)
        if all(given.get(name) is None for name in ("pixel_values", "image_codes", "codebook_embeds")):
            placeholders = int((input_ids == self.config.image_token_id).sum())
            if placeholders:
                raise ValueError(
                    f"The prompt has {placeholders} placeholders of pictures (token {self.config.image_token_id}), "
                    "and no picture is given; give pixel_values, as ETTProcessor makes them of pictures and text."
                )

    def _check_drawing(self, input_ids, num_pictures, generator, temperature, top_k, top_p, guidance_scale):
        if not bool((input_ids[:, -1] == self.config.image_start_token_id).all()):
            raise ValueError(
                f"Each prompt must end with the image start token {self.config.image_start_token_id}; pad on the "
                'left. ETTProcessor(text=..., generation_mode="image") does both.'
            )
        if num_pictures < 1:
            raise ValueError(
                "There is no picture to draw; expected num_images_per_prompt and prompts to be 1 or more."
            )
        in_range = temperature > 0 and 0 < top_p <= 1 and (top_k is None or top_k >= 1) and guidance_scale >= 1
        if not in_range:
            raise ValueError(
                f"Got temperature {temperature}, top_p {top_p}, top_k {top_k}, guidance_scale {guidance_scale}; "
                "expected temperature > 0, 0 < top_p <= 1, top_k >= 1 and guidance_scale >= 1."
            )
        if isinstance(generator, (list, tuple)) and len(generator) != num_pictures:
            raise ValueError(f"Got {len(generator)} generators for {num_pictures} pictures; give one a picture.")

    def _check_speed(self, jacobi_window: int, compile_config: CompileConfig | None):
        language_model, cache = self.model.language_model, DynamicCache(config=self.config.text_config)
        name = type(language_model).__name__
        if jacobi_window < 1:
            raise ValueError(f"jacobi_window is {jacobi_window}; expected at least 1.")
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
