"""Registration of ETT's models with transformers, diffusers and peft.

transformers has functions for registration; diffusers and peft have none. diffusers finds classes by their names in
its own package. peft finds the default `target_modules` of adapters in tables by model type. ETT adds its names there.
"""

import sys

import diffusers
import transformers
from peft.utils import constants as peft_constants

from .modeling_ett.configuration_ett import ETTConfig
from .modeling_ett.modeling_ett import ETTForConditionalGeneration, ETTModel
from .modeling_ett.modeling_ibq import IBQModel
from .processing_ett import ETTImageProcessor, ETTProcessor
from .processing_ett.pipeline_ett import register_pipelines
from .processing_ett.text_to_image_pipeline_ett import ETTTextToImagePipeline

# One class serves both backends. transformers asks for the torchvision class first, and warns if it is missing.
_BACKENDS = ("torchvision", "pil")

_ADAPTED = (
    "q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|"
    "c_attn|c_proj|c_fc|query_key_value|dense|dense_h_to_4h|dense_4h_to_h"
)
"""Names of the linear layers of attention and MLP in the language models of transformers."""


def register():
    """Register ETT's classes and pipelines. `import ett` calls this once."""
    transformers.AutoConfig.register(ETTConfig.model_type, ETTConfig, exist_ok=True)
    transformers.AutoModel.register(ETTConfig, ETTModel, exist_ok=True)
    for auto_class in (transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM):
        auto_class.register(ETTConfig, ETTForConditionalGeneration, exist_ok=True)
    transformers.AutoProcessor.register(ETTConfig, ETTProcessor, exist_ok=True)
    image_processors = dict.fromkeys(_BACKENDS, ETTImageProcessor)
    transformers.AutoImageProcessor.register(ETTConfig, image_processor_classes=image_processors, exist_ok=True)
    register_pipelines()

    diffusers.IBQModel = IBQModel
    diffusers.ETTTextToImagePipeline = ETTTextToImagePipeline
    # `DiffusionPipeline` looks here for the components that model_index.json names.
    diffusers.pipelines.ett = sys.modules[__package__]

    # The pattern matches linear layers of the language model only, because the vision tokenizer's have the same names.
    # Methods that adapt the same layers as LoRA have an equal table.
    lora = dict(peft_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    for name, table in vars(peft_constants).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and table == lora:
            table.setdefault(ETTConfig.model_type, rf"(.*\.)?language_model\..*\.({_ADAPTED})")


__all__ = ["register"]
