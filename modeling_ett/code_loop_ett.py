"""The loop that samples an image's codes one after another."""

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import Cache, CompileConfig, DynamicCache, LogitsProcessorList, StaticCache

from .sampling_ett import CodeSampler

_STATIC_CACHES: WeakKeyDictionary[torch.nn.Module, StaticCache] = WeakKeyDictionary()


class CodeLoopMixin:
    """The loop, for a model with `model`, `visual_head` and `config`."""

    @torch.no_grad()
    def _generate_codes(
        self,
        num_codes: int,
        width: int,
        images: dict[str, torch.Tensor | None],
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        num_return_sequences: int,
        guidance_scale: float,
        choose: CodeSampler,
        logits_processor: LogitsProcessorList | None,
        jacobi_window: int,
        compile_config: CompileConfig | None,
    ) -> Iterator[tuple[torch.LongTensor, torch.FloatTensor]]:
        num_prompts, prompt_length = input_ids.shape
        num_images = num_prompts * num_return_sequences
        rows = torch.arange(num_prompts, device=input_ids.device).repeat_interleave(num_return_sequences)
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
            **images,
        ).last_hidden_state[:, -1:]
        hidden_states = hidden_states[rows.to(hidden_states.device)]
        num_places = num_codes + jacobi_window - 1
        attention_mask = F.pad(attention_mask[rows], (0, num_places), value=1)
        position_ids = position_ids[rows, -1:] + torch.arange(1, jacobi_window + 1, device=rows.device)
        # Guesses beyond the image are scored, too, and there the context may have ended.
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
        codes, done = torch.zeros(num_images, num_places, dtype=torch.long, device=scores.device), 0
        while True:
            scores = scores[:, : num_codes - done]
            if logits_processor is not None:
                scores = logits_processor(codes[:, :done], scores[:, 0]).unsqueeze(1)
            chosen, right = choose(scores, done), 1
            places = slice(done, done + scores.shape[1])
            if scores.shape[1] > 1:
                # A code is final if all before it were scored by what was then chosen there.
                agree = (chosen == codes[:, places])[:, :-1].all(dim=0)
                right += int(agree.long().cumprod(dim=0).sum())
            codes[:, places] = chosen
            for place in range(right):
                yield chosen[:, place], scores[:, place]
            done += right
            if done == num_codes:
                if compile_config is not None:
                    _STATIC_CACHES[self] = cache
                return
            if jacobi_window > 1 and places.start > 0:
                cache.crop(right - jacobi_window)
            for place in range(places.stop, done + jacobi_window - 1):
                # A first guess is the code above.
                codes[:, place] = codes[:, max(place - width, 0)]
            seen = slice(done - 1, done - 1 + jacobi_window)
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
        """Codes `(num_images, num_places)`, at `places` in images of `width` codes a row, to guided scores
        `(num_images, num_places, K)` of what follows each."""
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
        """The rows of a cache in one of fixed addresses: that of the model's last call, so that its graph may be
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


__all__ = ["CodeLoopMixin"]
