"""Drawing: the loop that samples a picture's codes one after another, and the choice between text and pictures."""

import torch
from transformers import DynamicCache


class ImageGenerationMixin:
    """Adds `generation_mode="image"` to `generate` of a model with `model`, `visual_head` and `config`."""

    def require_visual_head(self):
        """Raises `ValueError` where the model cannot draw."""
        if not self.config.visual_head:
            raise ValueError(
                "This model has no visual head (config.visual_head is false): it reads pictures but cannot draw them. "
                "Use a generation model such as ETT-Gen."
            )

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, generation_mode: str = "text", **kwargs):
        """
        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt; also as `input_ids`.
            generation_mode (`"text"` or `"image"`): What to generate.
            kwargs: For text all that [`~transformers.GenerationMixin.generate`] takes; for pictures see
                [`~ImageGenerationMixin.generate_image_codes`].

        Returns:
            For text what transformers returns; for pictures codes of shape `(batch_size, height, width)`.
        """
        if generation_mode == "text":
            return super().generate(inputs, **kwargs)
        if generation_mode != "image":
            raise ValueError(f'generation_mode is {generation_mode!r}; expected "text" or "image".')
        if inputs is not None:
            kwargs["input_ids"] = inputs
        return self.generate_image_codes(**kwargs)

    @torch.no_grad()
    def generate_image_codes(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        guidance_scale: float = 3.0,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """Draws one picture a prompt. The paper's settings (section 4.3) are the defaults: every code, `top_p` 1.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompts that end with the token
                `config.image_start_token_id`, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 at padding.
            image_size (`tuple[int, int]`): Height and width in pixels, multiples of the tokenizer's factor; by default
                `config.image_size` each.
            guidance_scale (`float`): Classifier-free guidance: scores are moved from those of the empty prompt by this
                factor. At 1 the empty prompt is not computed.
            do_sample (`bool`): Sample, or take the best code each time.
            temperature, top_k, top_p: Sampling; the filters see guided scores divided by the temperature.
            generator (`torch.Generator` or a list of one a picture): Source of randomness. With a list, a picture does
                not depend on its neighbours in the batch.

        Returns:
            Codes of shape `(batch_size, height, width)` for [`~ImageGenerationMixin.decode_image_tokens`].

        Raises:
            ValueError: The model has no visual head, a prompt does not end with the image start token, the size does
                not fit the tokenizer, or a sampling option is out of range.
        """
        self.require_visual_head()
        batch_size = input_ids.shape[0]
        height, width = self._code_grid(image_size)
        if not bool((input_ids[:, -1] == self.config.image_start_token_id).all()):
            raise ValueError(
                f"Each prompt must end with the image start token {self.config.image_start_token_id}; pad on the "
                'left. ETTProcessor(text=..., generation_mode="image") does both.'
            )
        if temperature <= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1) or guidance_scale < 1:
            raise ValueError(
                f"Got temperature {temperature}, top_p {top_p}, top_k {top_k}, guidance_scale {guidance_scale}; "
                "expected temperature > 0, 0 < top_p <= 1, top_k >= 1 and guidance_scale >= 1."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Got {len(generator)} generators for {batch_size} prompts; give one a prompt.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        guided = guidance_scale > 1
        if guided:
            # The empty prompt is the image start token alone.
            empty_mask = torch.zeros_like(attention_mask)
            empty_mask[:, -1] = 1
            input_ids = input_ids.repeat(2, 1)
            attention_mask = torch.cat([attention_mask, empty_mask])

        cache = DynamicCache(config=self.config.text_config)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        codes = []
        for _ in range(height * width):
            hidden_states = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            scores = self.visual_head(hidden_states[:, -1]).float()
            if guided:
                conditional, empty = scores.chunk(2)
                scores = empty + guidance_scale * (conditional - empty)
            code = sample_codes(scores, generator, temperature, top_k, top_p) if do_sample else scores.argmax(-1)
            codes.append(code)
            step = code.repeat(2) if guided else code
            inputs_embeds = self.model.embed_codes(step[:, None, None]).to(inputs_embeds.dtype)
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1)
            position_ids = position_ids[:, -1:] + 1
        return torch.stack(codes, dim=1).view(batch_size, height, width)

    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.Tensor:
        """Codes `(batch_size, height, width)` to pixels `(batch_size, 3, H, W)`, clamped to `[-1, 1]`."""
        return self.model.vision_tokenizer.decode_codes(image_tokens).sample.clamp(-1, 1)

    def _code_grid(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        factor = self.model.vision_tokenizer.spatial_factor
        height, width = image_size or (self.config.image_size, self.config.image_size)
        if height % factor or width % factor or min(height, width) <= 0:
            raise ValueError(f"image_size is {height} x {width} pixels; expected positive multiples of {factor}.")
        return height // factor, width // factor


def sample_codes(
    scores: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> torch.LongTensor:
    """Draws one code a row of `scores` `(batch_size, K)`, from the `top_k` best and the smallest set whose
    probabilities sum to `top_p` or more. Returns codes `(batch_size,)`."""
    scores = scores / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        threshold = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0))
    if isinstance(generator, list):
        draws = [
            torch.multinomial(row, 1, generator=source) for row, source in zip(probabilities, generator, strict=True)
        ]
        return torch.cat(draws)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


__all__ = ["ImageGenerationMixin", "sample_codes"]
