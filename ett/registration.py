"""Makes transformers know ETT without loading transformers, or torch, before anyone uses them.

The Auto classes take classes, and a model's class costs an import of torch. But transformers finds its own models
lazily: from tables of names, and then from the module `transformers.models.<model type>`. ETT does so in two steps:

1. `prepare` waits until transformers loads its tables (`transformers.models.auto.auto_mappings`, plain data), then
   adds ETT's three names to them and lets this module stand for `transformers.models.ett`.
2. When transformers asks for one of ETT's classes, `register` enters all of them with the public `Auto*.register`
   functions, and the pipelines too.

Whoever imports ETT's model directly sets off `register` as well, so the Auto classes know every ETT model that exists.
Where the Auto classes are loaded already, and torch with them, there is nothing to wait for.

diffusers has one `AutoModel`, which looks for the class of a `config.json` among the names of the package `diffusers`.
ETT adds the name `IBQModel` there; the class is loaded when it is first used. `DiffusionPipeline` looks there for the
pipeline of a `model_index.json`, and in `diffusers.pipelines` for the modules of its parts: ETT adds the name
`ETTTextToImagePipeline` and the module `ett`.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType

from .rooms import room

_AUTO = "transformers.models.auto.configuration_auto"
_TABLES = "transformers.models.auto.auto_mappings"
_MODEL = "modeling_ett.modeling_ett"
_DIFFUSERS = "diffusers"
_PIPELINE = "ETTTextToImagePipeline"

_PEFT_TABLES = "peft.utils.constants"
_ADAPTED = (
    "q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|"
    "c_attn|c_proj|c_fc|query_key_value|dense|dense_h_to_4h|dense_4h_to_h"
)
"""Linear maps of attention and MLP, as the language models of transformers name them."""

# One class serves both; transformers asks for torchvision first, and warns where there is none.
_BACKENDS = ("torchvision", "pil")


class _AfterImport(MetaPathFinder):
    """Calls `action(module)` once, right after the module `name` was first imported."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name = name
        self.action = action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_then_act(module: ModuleType):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.action(module)

            spec.loader.exec_module = execute_then_act
        return spec


def prepare():
    """Called once by `import ett`."""
    if _AUTO in sys.modules or _MODEL in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(_TABLES, _add_names))
        sys.meta_path.insert(0, _AfterImport(_MODEL, lambda module: register()))
    if _DIFFUSERS in sys.modules:
        _add_to_diffusers(sys.modules[_DIFFUSERS])
    else:
        sys.meta_path.insert(0, _AfterImport(_DIFFUSERS, _add_to_diffusers))
    if _PEFT_TABLES in sys.modules:
        _add_adapter_targets(sys.modules[_PEFT_TABLES])
    else:
        sys.meta_path.insert(0, _AfterImport(_PEFT_TABLES, _add_adapter_targets))


def _add_to_diffusers(module: ModuleType):
    """Adds ETT's names to diffusers' table of lazily loaded classes, and this module to its pipelines'."""
    # While it is imported, diffusers puts a lazy module in its own place.
    lazy = sys.modules[_DIFFUSERS]
    if hasattr(lazy, "_class_to_module"):
        lazy._class_to_module |= {"IBQModel": "models.ett", _PIPELINE: "pipelines.ett"}
        sys.modules["diffusers.models.ett"] = sys.modules["diffusers.pipelines.ett"] = sys.modules[__name__]
        lazy.pipelines.ett = sys.modules[__name__]


def _add_adapter_targets(tables: ModuleType):
    """peft's default `target_modules` of LoRA and of the methods that share its table: the language model's linear
    maps, and none of the vision tokenizer's, whose names are the same."""
    lora = dict(tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    for name, table in vars(tables).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and table == lora:
            table.setdefault("ett", rf"(.*\.)?language_model\..*\.({_ADAPTED})")


def _add_names(tables: ModuleType):
    tables.CONFIG_MAPPING_NAMES["ett"] = "ETTConfig"
    tables.PROCESSOR_MAPPING_NAMES["ett"] = "ETTProcessor"
    tables.IMAGE_PROCESSOR_MAPPING_NAMES["ett"] = dict.fromkeys(_BACKENDS, "ETTImageProcessor")
    sys.modules["transformers.models.ett"] = sys.modules[__name__]


def __getattr__(name: str):
    if name in ("ETTConfig", "ETTProcessor", "ETTImageProcessor", "ETTForConditionalGeneration", "IBQModel"):
        register()
        return globals()[name]
    if name == _PIPELINE:
        return room("processing_ett.text_to_image_pipeline_ett").ETTTextToImagePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register():
    """Enters ETT's classes and pipelines into transformers' registries; may be called again."""
    import transformers

    config = room("modeling_ett.configuration_ett").ETTConfig
    models = room(_MODEL)
    processing = room("processing_ett")
    globals().update(
        ETTConfig=config,
        ETTProcessor=processing.ETTProcessor,
        ETTImageProcessor=processing.ETTImageProcessor,
        ETTForConditionalGeneration=models.ETTForConditionalGeneration,
        IBQModel=room("modeling_ett.modeling_ibq").IBQModel,
    )
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(config, models.ETTModel, exist_ok=True)
    for auto_class in (transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM):
        auto_class.register(config, models.ETTForConditionalGeneration, exist_ok=True)
    transformers.AutoProcessor.register(config, processing.ETTProcessor, exist_ok=True)
    transformers.AutoImageProcessor.register(
        config, image_processor_classes=dict.fromkeys(_BACKENDS, processing.ETTImageProcessor), exist_ok=True
    )
    room("processing_ett.pipeline_ett").register_pipelines()


__all__ = ["prepare", "register"]
