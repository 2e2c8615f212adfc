"""Makes transformers, diffusers and peft know ETT's models.

transformers has functions for it. diffusers and peft have none: diffusers finds classes by their names in its own
package, and peft the default `target_modules` of adapters in tables by model type, so ETT's names are added there.
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

# One class serves both; transformers asks for torchvision first, and warns where there is none.
_BACKENDS = ("torchvision", "pil")

_ADAPTED = (
    "q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|"
    "c_attn|c_proj|c_fc|query_key_value|dense|dense_h_to_4h|dense_4h_to_h"
)
"""Linear maps of attention and MLP, as the language models of transformers name them."""


def register():
    """Enters ETT's classes and pipelines; called once by `import ett`."""
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
    # Where `DiffusionPipeline` looks for the parts that model_index.json names.
    diffusers.pipelines.ett = sys.modules[__package__]

    # Linear maps of the language model, and none of the vision tokenizer's, whose names are the same. Methods that
    # adapt the same maps as LoRA have a table that equals its.
    lora = dict(peft_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    for name, table in vars(peft_constants).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and table == lora:
            table.setdefault(ETTConfig.model_type, rf"(.*\.)?language_model\..*\.({_ADAPTED})")


__all__ = ["register"]
