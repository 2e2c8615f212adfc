"""ETT: a vision tokenizer's codebook embeddings, through a projector, into a language model (paper, section 3).

- Pixels, codes and codebook embeddings are three ways in; they meet at embeddings, and nothing after that point knows
  which it was.
- The tokenizer is part of the model, so the caption loss reaches its encoder and its codebook.
- The same embeddings are decoded to an image when a reconstruction is asked for.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import cached_file, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_ett import ETTConfig
from .generation_ett import ImageGenerationMixin
from .joining_ett import check_parts, check_same_logits
from .loading_ett import one_sentence
from .modeling_ibq import IBQModel
from .quantizer_ibq import IBQQuantizerOutput
from .scoring_head import ScoringHead, summed_cross_entropy


@dataclass
class ETTImageFeatures(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(num_images, num_codes, D)`): Codebook embeddings in raster order;
            none of an "index" model.
        pooler_output (`torch.Tensor` of shape `(num_images, num_codes, C)`): The projected images, image by image.
        quantized ([`IBQQuantizerOutput`]): What the tokenizer made of `pixel_values`; with its losses in training.
    """

    quantized: IBQQuantizerOutput | None = None


@dataclass
class ETTModelOutputWithPast(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        cache, hidden_states, attentions: As in the language model.
        image_hidden_states (`torch.Tensor` of shape `(num_images, num_codes, hidden_size)`): The projected images.
        quantized ([`IBQQuantizerOutput`]): What the tokenizer made of `pixel_values`; with its losses in training.
    """

    last_hidden_state: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    quantized: IBQQuantizerOutput | None = None


@dataclass
class ETTCausalLMOutputWithPast(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `()`): Sum of the caption loss (where `labels` were given) and the code loss
            (with `predict_codes`).
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Scores of text tokens; not where
            `skip_logits` holds.
        code_logits (`torch.Tensor` of shape `(num_images * num_codes, K)`): Scores of each image's codes, in raster
            order; given with `predict_codes`, but not where `skip_logits` holds.
        reconstruction (`torch.Tensor` of shape `(num_images, 3, H, W)`): Given with `return_reconstruction`; not
            clamped.
        cache, hidden_states, attentions, image_hidden_states, quantized: See [`ETTModelOutputWithPast`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    code_logits: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    quantized: IBQQuantizerOutput | None = None


class CodePositions(nn.Module):
    """Learned vectors, of the language model's width, for `side` rows and `side` columns of codes. The paper's
    projector has no such part."""

    def __init__(self, side: int, hidden_size: int):
        super().__init__()
        self.rows = nn.Embedding(side, hidden_size)
        self.columns = nn.Embedding(side, hidden_size)

    def forward(self, rows: torch.LongTensor, columns: torch.LongTensor) -> torch.Tensor:
        """Rows and columns, each of shape `(num_codes,)`, to vectors `(num_codes, C)`."""
        return self.rows(rows) + self.columns(columns)


class ETTProjector(nn.Module):
    """Codebook embeddings `(..., num_codes, D)` to the language model's width `(..., num_codes, C)`: Linear, GELU,
    Linear (section 3.2). With `positions`, the codes' rows and columns are added."""

    def __init__(
        self, embed_dim: int, hidden_size: int, input_scale: float = 1.0, positions: CodePositions | None = None
    ):
        super().__init__()
        self.input_scale = input_scale
        self.linear_1 = nn.Linear(embed_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.positions = positions

    def forward(self, embeddings: torch.Tensor, places: torch.LongTensor, width: int) -> torch.Tensor:
        """
        Args:
            places (`torch.LongTensor` of shape `(num_codes,)`): The codes' places in their image, in raster order.
            width (`int`): Codes in a row of the image.
        """
        embeddings = embeddings.to(self.linear_1.weight.dtype) * self.input_scale
        projected = self.linear_2(F.gelu(self.linear_1(embeddings)))
        if self.positions is None:
            return projected
        return projected + self.positions(places // width, places % width)


class ETTPreTrainedModel(PreTrainedModel):
    config: ETTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["vision_tokenizer"]
    # For quantizers, which leave these out and want whole names: a quantized tokenizer would give other codes, and a
    # quantized projector would have the codebook embeddings cast to its integers. It costs that a model loaded in
    # float16 has its projector in float32.
    _keep_in_fp32_modules = ["model.vision_tokenizer", "vision_tokenizer", "model.projector", "projector"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module):
        if getattr(module, "keeps_torch_init", False):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As in transformers, but for its errors.

        Raises:
            OSError: There is no such folder or repository, or a file is missing in it.
            ValueError: Its files are damaged, or do not belong together.
        """
        with one_sentence(f"The model '{pretrained_model_name_or_path}'"):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model, and so of its caches. The vision tokenizer stays in float32, as pixels should."""
        return self.base_model.language_model.dtype


class ETTModel(ETTPreTrainedModel):
    """Tokenizer, projector and language model without heads. With `visual_embedding="index"` an embedding of the codes
    stands in the projector's place."""

    _keys_to_ignore_on_load_unexpected = [r"^visual_head\."]

    def __init__(self, config: ETTConfig):
        super().__init__(config)
        self.vision_tokenizer = IBQModel.from_config(config.vq_config)
        vq_config = self.vision_tokenizer.config
        modules = [*self.vision_tokenizer.modules()]
        with one_sentence("text_config"):
            hidden_size = config.text_config.hidden_size
            if config.visual_embedding == "index":
                # The codes are more tokens of the language model, and start as its tokens do.
                self.index_embedding = nn.Embedding(vq_config.num_vq_embeddings, hidden_size)
            else:
                # Components of unit vectors are about 1/sqrt(D); layers are initialised for inputs of about 1.
                input_scale = math.sqrt(vq_config.vq_embed_dim) if vq_config.l2_normalize else 1.0
                side = config.image_size // self.vision_tokenizer.spatial_factor
                positions = CodePositions(side, hidden_size) if config.code_positions else None
                self.projector = ETTProjector(vq_config.vq_embed_dim, hidden_size, input_scale, positions)
                # A language model's small deviation would start the projector near zero.
                modules += self.projector.modules()
            self.language_model = AutoModel.from_config(config.text_config)
        embeddings = self.language_model.get_input_embeddings()
        if isinstance(embeddings, nn.Embedding):
            # Its row would get no gradient, and padding may be the token that ends an answer.
            embeddings.padding_idx = None
        for module in modules:
            module.keeps_torch_init = True
        self.post_init()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ETTModel":
        """Every cast and every move of a model ends here. The vision tokenizer moves with the rest and stays in
        float32, whatever the rest is cast to: in another precision it would give other codes."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_cast = tensor.is_floating_point() and moved.dtype != tensor.dtype
            return tensor.to(moved.device, torch.float32) if is_cast else moved

        tokenizer = self._modules.get("vision_tokenizer")
        if tokenizer is None or not recurse:
            return super()._apply(fn, recurse)
        tokenizer._apply(move)
        # Its place is kept, because optimizers and checkpoints count parameters in their order.
        self._modules["vision_tokenizer"] = None
        try:
            return super()._apply(fn, recurse)
        finally:
            self._modules["vision_tokenizer"] = tokenizer

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        # Engines load a whole model through this class and drop what the rules above match: the head must not.
        super()._adjust_missing_and_unexpected_keys(loading_info)
        loading_info.unexpected_keys = {
            name for name in loading_info.unexpected_keys if not name.startswith("lm_head.")
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def quantize_pixels(self, pixel_values: torch.Tensor) -> IBQQuantizerOutput:
        """Pixels `(num_images, 3, H, W)` in `[-1, 1]` to codes and embeddings, with losses if it learns."""
        tokenizer = self.vision_tokenizer
        learns = self.training and any(parameter.requires_grad for parameter in tokenizer.parameters())
        device = tokenizer.execution_device
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and (learns or pixel_values.requires_grad)),
            # Half precision flips codes; a tokenizer that learns has none to keep.
            torch.autocast(device.type, enabled=learns and torch.is_autocast_enabled(device.type)),
        ):
            latents = tokenizer.encode(pixel_values.to(device, tokenizer.dtype)).latents
            return tokenizer.quantize(latents, return_losses=learns)

    def embed_codes(self, codes: torch.LongTensor, places: torch.LongTensor, width: int) -> torch.Tensor:
        """
        Args:
            codes (`torch.LongTensor` of shape `(num_images, num_codes)`): Codes of images, or of a part of each.
            places (`torch.LongTensor` of shape `(num_codes,)`): Their places in the image, in raster order.
            width (`int`): Codes in a row of the image.

        Returns:
            `torch.Tensor` of shape `(num_images, num_codes, C)`: The language model's inputs.
        """
        if self.config.visual_embedding == "index":
            return self.index_embedding(codes)
        return self.projector(self._flat_embeddings(codes.unsqueeze(1)), places, width)

    def _flat_embeddings(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes `(num_images, height, width)` to codebook embeddings `(num_images, height * width, D)`."""
        return self.vision_tokenizer.codes_to_embeddings(codes).flatten(2).transpose(1, 2)

    def check_grid(self, height: int, width: int):
        """
        Raises:
            ValueError: Images of `height` x `width` codes have more rows or columns than `code_positions`.
        """
        if self.config.code_positions:
            side = self.projector.positions.rows.num_embeddings
            if max(height, width) > side:
                raise ValueError(
                    f"The image has {height} x {width} codes, and this model's code_positions end at {side} x {side}; "
                    "choose a smaller image."
                )

    def _width(self, num_codes: int) -> int:
        """Codes in a row of a square image that comes as so many embeddings."""
        width = math.isqrt(num_codes)
        if width * width != num_codes:
            raise ValueError(
                f"codebook_embeds hold {num_codes} codes an image, from which code_positions cannot tell rows and "
                "columns; give image_codes or pixel_values for images that are not square."
            )
        return width

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        codebook_embeds: torch.FloatTensor | None = None,
        detach_codebook_embeds: bool = False,
        **kwargs,
    ) -> tuple | ETTImageFeatures:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, H, W)`, in `[-1, 1]`), or
            image_codes (`torch.LongTensor` of shape `(num_images, height, width)`), or
            codebook_embeds (`torch.Tensor` of shape `(num_images, height * width, D)`): Codebook embeddings, raster
                order.
            detach_codebook_embeds (`bool`): Cut the gradient between codebook embeddings and projector. The losses of
                the language model then train the projector and not the tokenizer.

        Raises:
            ValueError: Not exactly one of the three is given, embeddings are given to an "index" model, or with
                `code_positions` embeddings of images that are not square, or images of more codes a side than the
                model was made for.
        """
        given = {"pixel_values": pixel_values, "image_codes": image_codes, "codebook_embeds": codebook_embeds}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"Give images as one of {', '.join(given)}; given: {', '.join(names) or 'none'}.")
        quantized = None
        if pixel_values is not None:
            quantized = self.quantize_pixels(pixel_values)
            image_codes = quantized.codes
        if self.config.visual_embedding == "index":
            if image_codes is None:
                raise ValueError(
                    'codebook_embeds were given to a model with visual_embedding="index", which has its own embedding '
                    "for each code; give image_codes or pixel_values."
                )
            return ETTImageFeatures(pooler_output=self.index_embedding(image_codes.flatten(1)), quantized=quantized)
        if quantized is not None:
            codebook_embeds = quantized.embeddings.flatten(2).transpose(1, 2)
        elif image_codes is not None:
            codebook_embeds = self._flat_embeddings(image_codes)
        num_codes = codebook_embeds.shape[1]
        if image_codes is not None:
            width = image_codes.shape[-1]
        else:
            width = self._width(num_codes) if self.config.code_positions else num_codes
        self.check_grid(num_codes // width, width)
        places = torch.arange(num_codes, device=codebook_embeds.device)
        embeddings = codebook_embeds.detach() if detach_codebook_embeds else codebook_embeds
        projected = self.projector(embeddings, places, width)
        return ETTImageFeatures(last_hidden_state=codebook_embeds, pooler_output=projected, quantized=quantized)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        codebook_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        detach_codebook_embeds: bool = False,
        **kwargs,
    ) -> tuple | ETTModelOutputWithPast:
        """Images come as [`~ETTModel.get_image_features`] takes them, with `detach_codebook_embeds`; their embeddings
        replace, in order, the placeholders `config.image_token_id` in `input_ids`.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds` are given, or placeholders and codes differ
                in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = quantized = None
        if not (pixel_values is None and image_codes is None and codebook_embeds is None):
            features = self.get_image_features(
                pixel_values, image_codes, codebook_embeds, detach_codebook_embeds, return_dict=True
            )
            image_features, quantized = features.pooler_output, features.quantized
            placeholders = self.placeholder_mask(input_ids, image_features, inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(
                placeholders.unsqueeze(-1), image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        return ETTModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            quantized=quantized,
        )

    def placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        image_features: torch.Tensor,
        inputs_embeds: torch.FloatTensor | None = None,
    ) -> torch.BoolTensor:
        """Where images stand in `input_ids`, of its shape; without these, where `inputs_embeds` are the placeholder's
        embedding."""
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)
        else:
            mask = input_ids == self.config.image_token_id
        if not torch.compiler.is_compiling():
            placeholders, codes = int(mask.sum()), image_features.shape[0] * image_features.shape[1]
            if placeholders != codes:
                raise ValueError(
                    f"The inputs hold {placeholders} image placeholders (token {self.config.image_token_id}), but the "
                    f"{image_features.shape[0]} images have {codes} codes. Prepare both with one ETTProcessor call."
                )
        return mask


PIPELINE_FILES = ("pipeline_ett.py", "text_to_image_pipeline_ett.py", "model_index.json")
"""Files of an exported folder that no model imports, so that transformers does not copy them with the model's code."""

MODEL_INDEX = {
    "_class_name": "ETTTextToImagePipeline",
    "model": ["ett", "ETTForConditionalGeneration"],
    "processor": ["ett", "ETTProcessor"],
}
"""Content of `model_index.json`: where ETT is installed, `DiffusionPipeline.from_pretrained` loads a folder by it."""


class ETTForConditionalGeneration(ImageGenerationMixin, ETTPreTrainedModel, GenerationMixin):
    """ETT with a head for text and, where `config.visual_head` is set, one for image codes."""

    output_modalities = ("image", "text")

    def __init__(self, config: ETTConfig):
        super().__init__(config)
        self.model = ETTModel(config)
        hidden_size = config.text_config.hidden_size
        self.lm_head = ScoringHead(hidden_size, config.text_config.vocab_size)
        if config.visual_head:
            self.visual_head = ScoringHead(hidden_size, self.model.vision_tokenizer.config.num_vq_embeddings)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; for a model that generates images a `model_index.json` names the pipeline of diffusers.
        A model whose code came with its folder keeps the code of its pipelines, too."""
        super().save_pretrained(save_directory, **kwargs)
        if type(self).__module__.startswith("transformers_modules."):
            for name in PIPELINE_FILES:
                path = cached_file(self.name_or_path, name, _raise_exceptions_for_missing_entries=False)
                if path is not None and not os.path.exists(os.path.join(save_directory, name)):
                    shutil.copyfile(path, os.path.join(save_directory, name))
        elif self.config.visual_head and kwargs.get("is_main_process", True):
            with open(os.path.join(save_directory, "model_index.json"), "w", encoding="utf-8") as file:
                json.dump(MODEL_INDEX, file, indent=2)

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        vision_tokenizer: IBQModel,
        processor: ProcessorMixin | None = None,
        **config_kwargs,
    ) -> "ETTForConditionalGeneration":
        """Joins a causal language model and a tokenizer, sharing their weights; projector, or index embedding, and
        visual head are new.

        Args:
            language_model (`PreTrainedModel`): Any causal language model with a head, e.g. `Qwen2ForCausalLM`.
            vision_tokenizer ([`IBQModel`]): The vision tokenizer.
            processor ([`ETTProcessor`], *optional*): Gives the image tokens' numbers, and the tokens of texts, as
                [`~ETTForConditionalGeneration.set_text_tokens`] does.
            config_kwargs: Further fields of [`ETTConfig`], such as the image tokens' numbers and `visual_head`.

        Raises:
            TypeError: See [`check_parts`] and [`check_same_logits`].
        """
        check_parts(language_model, vision_tokenizer)
        vq_config = {name: value for name, value in vision_tokenizer.config.items() if not name.startswith("_")}
        text_config = language_model.config.to_dict()
        if processor is not None:
            names = ("image_token_id", "image_start_token_id", "image_end_token_id")
            config_kwargs = {**{name: getattr(processor, name) for name in names}, **config_kwargs}
        model = cls(ETTConfig(text_config=text_config, vq_config=vq_config, **config_kwargs))
        model.model.vision_tokenizer.load_state_dict(vision_tokenizer.state_dict())
        model.model.language_model.load_state_dict(language_model.base_model.state_dict())
        model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
        model.tie_weights()
        check_same_logits(model, language_model)
        if language_model.generation_config is not None:
            model.generation_config = language_model.generation_config
        if processor is not None:
            model.set_text_tokens(processor)
        return model

    def set_text_tokens(self, processor: ProcessorMixin):
        """Makes the model begin, end and pad texts as its processor does: generation then stops at the token that ends
        an answer in training, and not where the language model stopped before.

        Args:
            processor ([`ETTProcessor`]): The model's.
        """
        tokenizer, beginning = processor.tokenizer, processor.beginning_ids
        # The language model's own configuration is not changed.
        self.generation_config = copy.deepcopy(self.generation_config)
        self.generation_config.bos_token_id = beginning[0] if beginning else None
        for config in (self.generation_config, self.config.text_config):
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.FloatTensor | None = None, **kwargs) -> tuple | ETTImageFeatures:
        """As [`ETTModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def set_output_embeddings(self, value: nn.Module):
        if not isinstance(value, ScoringHead):
            # Resizing makes a plain layer.
            weight, (num_tokens, hidden_size) = value.weight, value.weight.shape
            value = ScoringHead(hidden_size, num_tokens, device="meta")
            value.weight = weight
            # It has its values, which a later `post_init` leaves alone.
            value._is_hf_initialized = value.weight._is_hf_initialized = True
        self.lm_head = value

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        codebook_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        predict_codes: bool = False,
        return_reconstruction: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> tuple | ETTCausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Text tokens to predict, -100 where
                none (equation 2).
            shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): In place of `labels`, the token
                that follows each position.
            predict_codes (`bool`): Also predict the images' codes, each from what stands before it.
            return_reconstruction (`bool`): Also decode `pixel_values`' embeddings to an image.
            logits_to_keep (`int` or `torch.Tensor`): As everywhere in transformers.
            num_items_in_batch (`torch.Tensor`): Number of labels over which the losses are averaged.
            skip_logits (`bool`): Compute the losses of labels alone, without the scores of all positions; by default
                in training.

        The rest is as in [`ETTModel`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_codes=image_codes,
            codebook_embeds=codebook_embeds,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        losses, logits, code_logits, reconstruction = [], None, None, None
        has_labels = labels is not None or shift_labels is not None
        if skip_logits is None:
            skip_logits = self.training and (has_labels or predict_codes)
        if not skip_logits and (has_labels or not predict_codes):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if shift_labels is not None:
            losses.append(self._loss(self.lm_head, hidden_states, shift_labels, num_items_in_batch))
        elif labels is not None:
            losses.append(self._loss(self.lm_head, hidden_states[:, :-1], labels[:, 1:], num_items_in_batch))
        if predict_codes:
            self.require_visual_head()
            codes = image_codes if outputs.quantized is None else outputs.quantized.codes
            if codes is None:
                raise ValueError("Codes can be predicted of pixel_values or image_codes; neither was given.")
            before_codes = self._before_codes(hidden_states, input_ids)
            if not skip_logits:
                code_logits = self.visual_head(before_codes)
            losses.append(self._loss(self.visual_head, before_codes, codes.flatten(), num_items_in_batch))
        if return_reconstruction:
            if outputs.quantized is None:
                raise ValueError("A reconstruction was asked for without pixel_values.")
            reconstruction = self.model.vision_tokenizer.decode(
                outputs.quantized.embeddings, force_not_quantize=True
            ).sample
        return ETTCausalLMOutputWithPast(
            loss=sum(losses) if losses else None,
            logits=logits,
            code_logits=code_logits,
            reconstruction=reconstruction,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            quantized=outputs.quantized,
        )

    @staticmethod
    def _loss(
        head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-entropy of labels, as a mean over them or over `num_items`."""
        if num_items is None:
            num_items = (labels != -100).sum().clamp(min=1)
        if isinstance(head, ScoringHead):
            return head(hidden_states, labels) / num_items
        # Adapters wrap a head, and change its scores, which it must therefore give.
        return summed_cross_entropy(head, hidden_states, labels) / num_items

    def _before_codes(self, hidden_states: torch.Tensor, input_ids: torch.LongTensor) -> torch.Tensor:
        """Hidden states `(num_codes_in_batch, C)` before each placeholder, from which its code is predicted."""
        return hidden_states[:, :-1][input_ids[:, 1:] == self.config.image_token_id]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor | None = None,
        image_codes: torch.LongTensor | None = None,
        codebook_embeds: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # Later steps find the images in the cache.
        if is_first_iteration or not kwargs.get("use_cache", True):
            model_inputs.update(pixel_values=pixel_values, image_codes=image_codes, codebook_embeds=codebook_embeds)
        return model_inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        """As in every model, but with a text all of its images are repeated, however many it has."""
        names = ("pixel_values", "image_codes", "codebook_embeds")
        images = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
        if expand_size > 1 and len(images) == 1:
            [(name, values)] = images.items()
            if name == "pixel_values":
                # Once, not once a copy.
                name, values = "image_codes", self.model.quantize_pixels(values).codes
            codes = values.flatten(1) if name == "image_codes" else values
            embeds = model_kwargs.get("inputs_embeds")
            places = self.model.placeholder_mask(input_ids if embeds is None else None, codes, embeds)
            numbers = places.sum(dim=1).tolist()
            repeated = [group for group in codes.flatten(0, 1).split(numbers) for _ in range(expand_size)]
            images = {name: torch.cat(repeated).view(-1, *values.shape[1:])}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}


__all__ = [
    "CodePositions",
    "ETTCausalLMOutputWithPast",
    "ETTForConditionalGeneration",
    "ETTImageFeatures",
    "ETTModel",
    "ETTModelOutputWithPast",
    "ETTPreTrainedModel",
    "ETTProjector",
]
