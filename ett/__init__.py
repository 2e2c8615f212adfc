"""ETT, end-to-end vision tokenizer tuning: the front door.

    import ett                                     # AutoModel, AutoProcessor and pipeline now know ETT's folders
    from ett import ETTForConditionalGeneration    # or take a class by name

Importing this package loads neither torch nor transformers: a name is loaded when it is first used, and registration
with transformers waits for transformers (see `ett.registration`).
"""

from . import registration
from .rooms import room

__version__ = "0.1.0"

_ROOM_OF = {
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

__all__ = list(_ROOM_OF)


def __getattr__(name: str):
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = room(_ROOM_OF[name])
    if module.__name__.startswith(("modeling_ett", "processing_ett")):
        registration.register()
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.prepare()
