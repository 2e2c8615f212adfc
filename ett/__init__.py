"""ETT, end-to-end vision tokenizer tuning: public names and registration.

    import ett                                     # AutoModel, AutoProcessor and pipeline now load ETT models
    from ett import ETTForConditionalGeneration    # or import a class by name

All packages of the repository are subpackages of `ett`: `ett.modeling_ett`, `ett.processing_ett`, `ett.train`,
`ett.hub_cards` and others. The import of any of them registers ETT. Code for training and publishing is imported at
first use.
"""

import importlib
import logging
import os

# In a checkout the subpackages are next to this folder; in an installed package they are inside it.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(_checkout, "modeling_ett")):
    __path__.append(_checkout)

# Other libraries import bitsandbytes if it is installed, and it then warns about kernels that ETT does not use.
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
