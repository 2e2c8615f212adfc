"""ETT, end-to-end vision tokenizer tuning: the front door.

    import ett                                     # AutoModel, AutoProcessor and pipeline now know ETT's folders
    from ett import ETTForConditionalGeneration    # or take a class by name

All rooms are packages in this one (`ett.modeling_ett`, `ett.processing_ett`, `ett.train`, `ett.hub_cards` and others),
and importing any of them registers ETT. What only training and publishing need is loaded when it is first used.
"""

import importlib
import logging
import os

# In a checkout the rooms stand beside this folder; in an installed package, inside it.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(_checkout, "modeling_ett")):
    __path__.append(_checkout)

# Where bitsandbytes is installed, other libraries import it, and it remarks on kernels that nobody asked for.
_logger = logging.getLogger("bitsandbytes")
_level = _logger.level
_logger.setLevel(logging.ERROR)
from .registration import register

_logger.setLevel(_level)

__version__ = "0.1.0"

_MODULE_OF = {
    "IBQModel": "modeling_ett.modeling_ibq",
    "ETTConfig": "modeling_ett.configuration_ett",
    "ETTModel": "modeling_ett.modeling_ett",
    "ETTForConditionalGeneration": "modeling_ett.modeling_ett",
    "ETTImageProcessor": "processing_ett",
    "ETTProcessor": "processing_ett",
    "ETTTextToImagePipeline": "processing_ett.text_to_image_pipeline_ett",
    "load_image": "processing_ett",
    "Scenes": "scenes_ett",
    "ETTTrainer": "train",
    "ETTTrainingArguments": "train",
    "run_recipe": "train",
    "write_card": "hub_cards",
    "export_folder": "hub_cards",
    "push_folder": "hub_cards",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
