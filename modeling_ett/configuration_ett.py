"""Configuration of ETT: a language model of transformers, an IBQ tokenizer, and the few numbers that join them."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import modeling_auto
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.utils.versions import require_version

from .loading_ett import one_sentence

require_version("transformers>=5.24", "ETT's models need it; pip install -U transformers")


MAX_LAYERS = 1000
"""Most layers of a language model. A model of more is not built, since that would have no end."""

MAX_IMAGE_SIZE = 2**15
"""Longest side of images, in pixels."""


@strict
class ETTConfig(PreTrainedConfig):
    r"""
    Args:
        text_config (`PreTrainedConfig` or `dict`): Configuration of any causal language model of transformers that
            takes `inputs_embeds`; the default is Qwen2.
        vq_config (`dict`): Configuration of the [`IBQModel`]; fields left out have the paper's values.
        image_token_id (`int`): Placeholder that stands once for each code of an image.
        image_start_token_id, image_end_token_id (`int`): Tokens around an image's placeholders.
        image_size (`int`): Pixels along each side of the images that the model was trained on and draws by default.
        visual_embedding (`"codebook"` or `"index"`): The language model's embedding of a code. `"codebook"`: the
            projected codebook embedding (the paper's method). `"index"`: a learned one for each of the K codes, of the
            language model's width, without a projector (the paper's baseline, as in Emu3).
        code_positions (`bool`): Whether learned vectors of a code's row and column, as many as `image_size` has, are
            added to its projected embedding. The paper has only the language model's own positions; a small model
            learns sooner with rows and columns.
        visual_head (`bool`): Whether the model can draw, that is, has a head from hidden states to codes.
        answers (`bool`): Whether the model is for answers; one that was trained to draw last has unlearned them.

    The tokens' defaults are those of Qwen2.5's vocabulary, so that nothing is added to it.
    """

    model_type = "ett"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")}

    text_config: dict | PreTrainedConfig | None = None
    vq_config: dict[str, Any] | None = None
    image_token_id: int = 151655
    image_start_token_id: int = 151652
    image_end_token_id: int = 151653
    image_size: int = 512
    visual_embedding: Literal["codebook", "index"] = "codebook"
    code_positions: bool = False
    visual_head: bool = False
    answers: bool = True
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # An exported folder names its own code, for those who do not have this.
            for name in ("auto_map", "custom_pipelines"):
                kwargs.pop(name, None)
        if isinstance(self.text_config, dict):
            # Before a configuration is made of it, which lists its layers.
            check_layers(self.text_config, "text_config")
        if not 0 < self.image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size is {self.image_size}; expected 1 to {MAX_IMAGE_SIZE} pixels.")
        super().__post_init__(**kwargs)
        self.vq_config = dict(self.vq_config or {})
        if self.code_positions and self.visual_embedding == "index":
            raise ValueError(
                'code_positions are part of the projector, which visual_embedding="index" lacks; leave one out.'
            )
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        with one_sentence(f"The configuration of '{pretrained_model_name_or_path}'"):
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        with one_sentence("The configuration of an ETT model"):
            return super().from_dict(config_dict, **kwargs)

    def check_context(self, prompt_length: int, num_codes: int = 0):
        """
        Args:
            prompt_length (`int`): Tokens of the prompt, those of images included.
            num_codes (`int`): Codes of the image to draw; without, one token of an answer has to fit.

        Raises:
            ValueError: The language model's context has no room for the prompt and what is to follow.
        """
        context = getattr(self.text_config, "max_position_embeddings", None)
        if context is None or prompt_length + max(num_codes, 1) <= context:
            return
        if num_codes:
            raise ValueError(
                f"The prompt has {prompt_length} tokens and the image {num_codes} codes, together more than the "
                f"{context} of the language model's context; shorten the prompt or draw a smaller image."
            )
        raise ValueError(
            f"The prompt has {prompt_length} tokens, images included, and the language model's context ends at "
            f"{context}; shorten it."
        )


def check_layers(fields: dict[str, Any], prefix: str):
    """Raises `ValueError` where the fields of a language model's configuration ask for too many layers or none."""
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        layers = fields.get(name)
        if isinstance(layers, (int, float)) and not 0 < layers <= MAX_LAYERS:
            raise ValueError(f"{prefix}.{name} is {layers!r:.100}; expected 1 to {MAX_LAYERS} layers.")


# `transformers serve` asks this table, to which `AutoModelForMultimodalLM.register` adds nothing, what it can load.
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[ETTConfig.model_type] = "ETTForConditionalGeneration"

__all__ = ["ETTConfig"]
