"""The models that training starts from: of a folder or the Hub, or new ones from a recipe's fields."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ett.common_ett.files import read_fields
from ett.common_ett.model_folders import require_model_folder
from ett.common_ett.suggestions import suggestion
from ett.data_ett.codes import fit_of_codes, is_tokenized, read_tokenization
from ett.modeling_ett.configuration_ett import ETTConfig, check_layers
from ett.modeling_ett.loading_ett import load_whole, one_sentence
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor, ETTProcessor, build_word_tokenizer

from ..examples import Examples, Stream
from ..field_types import field_hints, typed
from ..recipes import NEW_MODEL, ModelSection, Recipe
from .initialization import start_linear
from .quantization import quantization_arguments, stay_trainable


def build_model(
    recipe: Recipe, examples: Examples | Stream
) -> tuple[IBQModel | ETTForConditionalGeneration, ETTProcessor | ETTImageProcessor]:
    """The model that training starts from, and what prepares its inputs."""
    section = recipe.model
    if recipe.learns.is_of_tokenizer:
        tokenizer = build_tokenizer(section.path or section.vision_tokenizer, section.linear_start)
        set_gradient_path(tokenizer, section)
        return tokenizer, _image_processor(section)
    if section.path is not None:
        require_model_folder(section.path, "ett")
        how = {}
        if section.load_in_4bit:
            how = quantization_arguments(torch.bfloat16 if recipe.training.get("bf16") else torch.float32)
        model = load_model(section, **how)
        check_visual_embedding(recipe, model.config.visual_embedding)
        stay_trainable(model)
        processor = ETTProcessor.from_pretrained(section.path)
        model.set_text_tokens(processor)
        return model, processor
    require_parts(section)
    vision_tokenizer = build_tokenizer(section.vision_tokenizer)
    text_tokenizer = build_text_tokenizer(section, examples)
    if isinstance(section.language_model, dict):
        language_model = new_language_model(section.language_model, text_tokenizer)
    else:
        language_model = AutoModelForCausalLM.from_pretrained(section.language_model, dtype=torch.float32)
    processor = ETTProcessor.from_parts(text_tokenizer, vision_tokenizer.spatial_factor, section.of_new("image_size"))
    if len(text_tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(text_tokenizer))
    model = join(language_model, vision_tokenizer, processor, section)
    set_gradient_path(model, section)
    return model, processor


def set_fit(recipe: Recipe, processor: ETTProcessor | ETTImageProcessor) -> str:
    """Gives the image processor the way in which the recipe fits images to the model's square, or that of the recipe's
    codes. Returns the way."""
    image_processor = getattr(processor, "image_processor", processor)
    data = recipe.data
    sources = [entry.get("source") for entry in data.mixture.values()] if data.mixture else [data.source]
    tokenized = [source for source in sources if source is not None and is_tokenized(source)]
    if tokenized:
        image_processor.fit = fit_of_codes(read_tokenization(tokenized[0]))
    elif data.fit is not None:
        image_processor.fit = data.fit
    return image_processor.fit


def _image_processor(section: ModelSection) -> ETTImageProcessor:
    side = section.of_new("image_size")
    return ETTImageProcessor(size={"height": side, "width": side})


def load_model(section: ModelSection, **kwargs) -> ETTForConditionalGeneration:
    """The model of the section's folder, in float32, with the section's settings of the gradient path, and with a new
    visual head where that has none and the section asks for one.

    Args:
        kwargs: As in `from_pretrained`.
    """
    draws = {"visual_head": True} if section.visual_head else {}
    model = load_folder(section.path, **draws, **kwargs)
    set_gradient_path(model, section)
    return model


def load_folder(source: str, **kwargs) -> ETTForConditionalGeneration:
    """The model of a folder or Hub repository, in float32. A visual head that `kwargs` add to it is new."""
    new = () if ETTConfig.from_pretrained(source).visual_head else ("visual_head.",)
    return load_whole(ETTForConditionalGeneration, source, new, **{"dtype": torch.float32, **kwargs})


def set_gradient_path(model: IBQModel | ETTForConditionalGeneration, section: ModelSection):
    """Gives a tokenizer, or that of an ETT model, what the section says of its gradient path; see
    [`IBQModel.set_gradient_path`]."""
    given = {name: getattr(section, name) for name in ("logit_scale", "straight_through_weight")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return
    if isinstance(model, IBQModel):
        model.set_gradient_path(**given)
    else:
        model.model.vision_tokenizer.set_gradient_path(**given)
        model.config.vq_config.update(given)


def check_visual_embedding(recipe: Recipe, visual_embedding: str | None = None):
    """Checks that what a recipe trains fits its model's embedding of the codes.

    Args:
        visual_embedding: The model's, by default as the recipe or its model's folder says. A model on the Hub is not
            checked before it is loaded.

    Raises:
        ValueError: A part is to learn that the model lacks or that no loss reaches, or no part is to learn that reads
            images.
    """
    section, train = recipe.model, recipe.train
    visual_embedding = visual_embedding or _stated_visual_embedding(section)
    if recipe.learns.is_of_tokenizer or visual_embedding is None:
        return
    if section.visual_embedding == "index" != visual_embedding:
        raise ValueError(
            f"model.visual_embedding is 'index', but the model '{section.path}' has 'codebook'; remove the former, or "
            "start from a model that recipe ablation_index_alignment made."
        )
    is_index = visual_embedding == "index"
    missing, present = ("projector", "index_embedding") if is_index else ("index_embedding", "projector")
    if missing in train:
        raise ValueError(
            f"train names {missing}, which a model with visual_embedding={visual_embedding} does not have; name "
            f"{present} instead."
        )
    if is_index and "vision_tokenizer" in train:
        raise ValueError(
            "train names vision_tokenizer, but with visual_embedding=index the language model sees indices, and its "
            "losses have no path to the tokenizer; remove vision_tokenizer."
        )
    if (
        is_index
        and recipe.learns.predicts_text
        and recipe.learns.has_images
        and not {"index_embedding", "language_model"} & set(train)
    ):
        raise ValueError(
            "With visual_embedding=index this stage trains nothing that learns from images; add index_embedding to "
            "train."
        )


def _stated_visual_embedding(section: ModelSection) -> str | None:
    """What the recipe says of a new model, or the `config.json` of a folder; None where there is none to read."""
    if section.path is None:
        return section.of_new("visual_embedding")
    try:
        return read_fields(Path(section.path) / "config.json").get("visual_embedding", "codebook")
    except (OSError, ValueError):
        return None


def build_processor(recipe: Recipe, examples: Examples | Stream) -> ETTProcessor | ETTImageProcessor:
    """What prepares the inputs of the model that [`build_model`] builds; no weights are loaded.

    Raises:
        ValueError: The recipe names no model, or one that is missing.
    """
    section = recipe.model
    if recipe.learns.is_of_tokenizer:
        return _image_processor(section)
    if section.path is not None:
        require_model_folder(section.path, "ett")
        return ETTProcessor.from_pretrained(section.path)
    require_parts(section)
    source = section.vision_tokenizer
    with torch.device("meta"):
        if isinstance(source, str):
            require_model_folder(source, "IBQModel")
            vision_tokenizer = IBQModel.from_config(IBQModel.load_config(source))
        else:
            vision_tokenizer = build_tokenizer(source)
    text_tokenizer = build_text_tokenizer(section, examples)
    return ETTProcessor.from_parts(text_tokenizer, vision_tokenizer.spatial_factor, section.of_new("image_size"))


def build_text_tokenizer(section: ModelSection, examples: Examples | Stream) -> PreTrainedTokenizerBase:
    """The language model's own, or for a new one a word-level tokenizer of the data's words."""
    if isinstance(section.language_model, dict):
        return build_word_tokenizer(examples.texts(), examples.spelled())
    return AutoTokenizer.from_pretrained(section.language_model)


def require_parts(section: ModelSection):
    """Raises `ValueError` where the parts of a new ETT model are not given."""
    if section.language_model is None or section.vision_tokenizer is None:
        raise ValueError(
            "This recipe needs a model: give model.path (an ETT model of a former stage), or both "
            "model.vision_tokenizer and model.language_model."
        )


def join(
    language_model: torch.nn.Module, vision_tokenizer: IBQModel, processor: ETTProcessor, section: ModelSection
) -> ETTForConditionalGeneration:
    """A new ETT model of two parts, that ends and pads texts as the processor's tokenizer does."""
    return ETTForConditionalGeneration.from_parts(
        language_model,
        vision_tokenizer,
        processor,
        **{name: section.of_new(name) for name in NEW_MODEL},
    )


def build_tokenizer(source: str | dict[str, Any] | None, linear_start: bool = False) -> IBQModel:
    """An IBQ tokenizer from a folder or Hub name, or a new one from its configuration's fields."""
    if isinstance(source, str):
        require_model_folder(source, "IBQModel")
        if linear_start:
            raise ValueError(
                f"model.linear_start would overwrite the weights of '{source}'; set model.linear_start=false."
            )
        return load_whole(IBQModel, source)
    try:
        tokenizer = IBQModel(**tokenizer_fields(source or {}))
    except (TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"model.vision_tokenizer cannot be used: {error}") from error
    if linear_start:
        start_linear(tokenizer)
    return tokenizer


def changes_codebook(recipe: Recipe, model: torch.nn.Module) -> bool:
    """Whether the recipe asks for another number of codes than the model, which is built already, has.

    Raises:
        ValueError: It does so where that cannot be done.
    """
    size = recipe.model.codebook_size
    if size is None:
        return False
    if not recipe.learns.is_of_tokenizer:
        raise ValueError("model.codebook_size is for the tokenizer's own stage (task reconstruction); remove it here.")
    if not isinstance(recipe.model.path or recipe.model.vision_tokenizer, str):
        raise ValueError(
            "model.codebook_size is for a tokenizer from a folder (model.path); a new one has its size in "
            "model.vision_tokenizer.num_vq_embeddings."
        )
    for name in ("codebook_size", "codebook_images"):
        value = getattr(recipe.model, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"model.{name} is {value!r}; expected a whole number above 0.")
    return size != model.config.num_vq_embeddings


def tokenizer_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a new [`IBQModel`] with their types.

    Raises:
        ValueError: A field is unknown, has another type or is out of range.
    """
    hints = field_hints(IBQModel.__init__)
    for name in values:
        if name not in hints:
            raise ValueError(
                f"model.vision_tokenizer cannot be used: it has no field {name!r}.{suggestion(str(name), list(hints))}"
            )
    return {name: typed(f"model.vision_tokenizer.{name}", value, hints[name]) for name, value in values.items()}


def new_language_model(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """A new small causal language model with the tokenizer's vocabulary.

    Raises:
        ValueError: Its kind or a field is unknown, or a value does not fit.
    """
    fields = dict(fields)
    check_layers(fields, "model.language_model")
    model_type = fields.pop("model_type", "qwen2")
    # A configuration would keep an unknown field without a word.
    with one_sentence("model.language_model"):
        known = [item.name for item in dataclasses.fields(AutoConfig.for_model(model_type))]
    of_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name in fields:
        if name in of_tokenizer:
            raise ValueError(f"model.language_model.{name} follows from the text tokenizer; remove it.")
        if name not in known:
            raise ValueError(
                f"The recipe has an unknown field 'model.language_model.{name}'.{suggestion(name, known)}"
            )
    with one_sentence("model.language_model"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **of_tokenizer, **fields))


__all__ = [
    "build_model",
    "build_processor",
    "changes_codebook",
    "check_visual_embedding",
    "join",
    "new_language_model",
    "set_fit",
    "tokenizer_fields",
]
