"""Recipes: a stage of training as a short YAML file, with overrides from the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from ett.common_ett.suggestions import suggestion
from ett.data_ett.tasks import TASKS, Task

from .arguments import ETTTrainingArguments
from .field_types import field_hints, typed

RECIPES = Path(__file__).parent / "recipes"


PARTS = ("vision_tokenizer", "index_embedding", "projector", "language_model", "visual_head")
"""Parts of a model that `train` may name."""

NEW_MODEL = {"image_size": 512, "code_positions": False, "visual_head": False, "visual_embedding": "codebook"}
"""What a new model has where the recipe says nothing."""

PARTS_OF_A_NEW_MODEL = ("vision_tokenizer", "language_model", "code_positions", "visual_embedding")
"""Fields of the model section that `model.path` on the command line takes the place of; of an ETT model `image_size`,
too."""


@dataclass
class ModelSection:
    """Model that training starts from: one folder, or parts of a new model.

    Args:
        path: Folder or Hub name of a model that a former stage left (an ETT model, or an IBQ tokenizer). Given as
            an override, it takes the place of the parts that the recipe's file names.
        vision_tokenizer: For a new model: folder or name of an IBQ tokenizer, or a dict of [`IBQModel`] fields.
        language_model: For a new ETT model: folder or name of a causal language model with its text tokenizer, or a
            dict of configuration fields (`model_type` first among them) for a new small one with a vocabulary of the
            data's words.
        load_in_4bit: Keep the language model's linear maps in 4 bits (bitsandbytes), beside the adapters of `lora`; in
            the end these are merged into the weights of `path`, in full precision.
        linear_start: Start a new tokenizer as a nearly linear map, which learns colours sooner.
        codebook_size: Codes that a tokenizer from a folder is to have, by default as many as it has. A smaller
            codebook keeps the codes that the training data use most, a larger one splits them.
        codebook_images: Images of the training data on which the use of codes is counted for another
            `codebook_size`.
        discriminator: Where the tokenizer learns: the discriminator to start from. By default this is
            `discriminator.safetensors` of the folder `path` or `vision_tokenizer`, or a new one where the folder has
            none. `new` always starts a new one. Anything else is a file: of a finished folder, of a checkpoint, or of
            `ett convert-tokenizer --discriminator`.
        image_size: Pixels along each side of the images; null for 512. That of an ETT model at `path` is fixed: null,
            or the same number.
        code_positions: For a new ETT model: whether the rows and columns of the codes are added to their embeddings
            (not in the paper); null for false, or as the model at `path` has it.
        visual_head: Whether the model generates images; null for false, or as the model at `path` has it. A model at
            `path` without a visual head gets a new one.
        visual_embedding: Of a new model: `codebook`, or `index` for the paper's baseline, which learns an embedding
            for each code and has no projector; null for `codebook`, or as the model at `path` has it.
        logit_scale: Factor on the logits of the tokenizer's straight-through softmax; null keeps the tokenizer's own.
        straight_through_weight: Weight of a plain straight-through copy beside that softmax; null keeps the
            tokenizer's own.
    """

    path: str | None = None
    vision_tokenizer: str | dict[str, Any] | None = None
    language_model: str | dict[str, Any] | None = None
    load_in_4bit: bool = False
    linear_start: bool = False
    codebook_size: int | None = None
    codebook_images: int = 10_000
    discriminator: str | None = None
    image_size: int | None = None
    code_positions: bool | None = None
    visual_head: bool | None = None
    visual_embedding: str | None = None
    logit_scale: float | None = None
    straight_through_weight: float | None = None

    def of_new(self, name: str) -> Any:
        """The field of this name for a new model, with its default where the recipe says nothing."""
        value = getattr(self, name)
        return NEW_MODEL[name] if value is None else value

    def __post_init__(self):
        # YAML reads 1e-2, which has no dot, as text.
        self.logit_scale, self.straight_through_weight = map(_number, (self.logit_scale, self.straight_through_weight))
        if self.logit_scale is not None and not (_is_number(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(
                f"model.logit_scale is {self.logit_scale!r}; expected a number above 0, or null for the tokenizer's "
                "own."
            )
        weight = self.straight_through_weight
        if weight is not None and not (_is_number(weight) and weight >= 0):
            raise ValueError(
                f"model.straight_through_weight is {weight!r}; expected 0 or a number above 0, or null for the "
                "tokenizer's own."
            )


@dataclass
class DataSection:
    """Training data.

    Args:
        source: `scenes` for the embedded dataset, or a folder, a file (JSON, JSON lines, Parquet, CSV, tar), a pattern
            of files, or a Hub name that datasets can load.
        mixture: Instead of one source, several by name. The fields of each take the place of those of this section.
        split: Split of the source.
        length: Number of scenes.
        ground: Background of the scenes: `mixed`, `plain`, `flat` or `textured`.
        in_memory: Prepare every example once, before training; images become codes where the tokenizer is frozen.
        questions_per_scene: Turns of a conversation about a scene.
        independent_turns: Turns of a conversation share its image, but do not see one another (task `chat`).
        prompt_dropout: Share of examples without their prompt (task `drawing`).
        max_length: Longest sequence, in tokens.
        packing: Examples of a batch share rows of up to `max_length` tokens, and none sees another.
        verify_codes: Before training from a folder of `ett tokenize`, compare every file with its checksum; sizes are
            compared in any case.
        image_column, text_column, messages_column: Columns of your data. In a webdataset `image` is the image file of
            any suffix, `text` the content of the txt file, and fields of the json file have their own names.
        image_folder: Folder to which the file names of images are relative; null for the folder of the data.
        fit: How images of another shape are fitted to the model's square, in training and ever after: `crop` cuts the
            sides off, `pad` keeps the whole image between grey borders, `stretch` changes its shape. Null for what the
            folder at `model.path` says, or `crop`. Codes (`ett tokenize`) keep the way in which they were made.
        filters: Filters of the rows, in their order, each a mapping of a `type` (`resolution`, `aspect_ratio`,
            `caption_length`, `near_duplicates` or `aesthetic`) and its fields.
        streaming: Read the data during training, endlessly and without a copy; needs `training.max_steps`.
        shuffle_rows: Undecoded rows in the shuffle buffer of streamed data.
    """

    source: str | None = None
    mixture: dict[str, dict[str, Any]] | None = None
    split: str = "train"
    length: int = 10_000
    ground: str = "mixed"
    in_memory: bool = False
    questions_per_scene: int = 6
    independent_turns: bool = False
    prompt_dropout: float = 0.0
    max_length: int = 4096
    packing: bool = False
    verify_codes: bool = False
    image_column: str = "image"
    text_column: str = "text"
    messages_column: str = "messages"
    image_folder: str | None = None
    fit: str | None = None
    filters: list[dict[str, Any]] = field(default_factory=list)
    streaming: bool = False
    shuffle_rows: int = 1000


@dataclass
class LoraSection:
    """Low-rank adapters (LoRA) of the language model. They train where `train` names `language_model`, whose own
    weights are frozen; other parts in `train` learn in full.

    Args:
        rank: Rank of the adapters; null for none, so that all weights of the language model learn.
        alpha: The adapters' product is scaled by `alpha / rank`; null for the rank.
        dropout: Share of an adapter's inputs left out in training.
        target_modules: Names of the linear layers that get an adapter; null for all of attention and MLP.
        merge: Whether the finished folder holds the merged model, with the adapters in `adapter/`. Otherwise it holds
            the adapters alone, which load over the folder that training started from.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None
    merge: bool = True

    def __post_init__(self):
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"lora.rank is {self.rank!r}; expected a whole number above 0, or null for no adapters.")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}; expected a number above 0, or null for that of the rank.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; expected a share from 0 to below 1.")


@dataclass
class Recipe:
    """A stage of training.

    Args:
        title: One line for people.
        task: `reconstruction` (a tokenizer alone), `text`, `caption`, `chat` or `drawing` (image generation).
        train: Parts that learn, the others are frozen: `vision_tokenizer`, `index_embedding`, `projector`,
            `language_model`, `visual_head`.
        model, data, lora: See [`ModelSection`], [`DataSection`] and [`LoraSection`].
        training: Fields of [`ETTTrainingArguments`].
    """

    title: str = ""
    task: str = "caption"
    train: list[str] = field(default_factory=list)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    lora: LoraSection = field(default_factory=LoraSection)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def learns(self) -> Task:
        """What `task` names."""
        return TASKS[self.task]


MIXTURE_FIELDS = (
    *("weight", "source", "split", "length", "ground", "questions_per_scene"),
    *("image_column", "text_column", "messages_column", "image_folder", "filters"),
)
"""What an entry of `data.mixture` may say of its own."""

SCENE_FIELDS = ("length", "ground", "questions_per_scene")
"""Fields of the data section that concern the embedded scenes alone."""

VQ_LOSS = (
    *("alpha", "caption_gradient_to_tokenizer", "squared_error_weight", "quantization_weight", "perceptual_weight"),
    *("adversarial_weight", "entropy_weight", "adaptive_adversarial_weight"),
)
"""Settings of the VQ loss, which is there where the tokenizer learns. Switched off (0) they may stand anywhere."""

CRITICS = (
    *("critics_batch_size", "perceptual_network", "perceptual_pretrained", "lecam_weight"),
    *("discriminator_learning_rate", "discriminator_lr_scheduler_type", "discriminator_max_grad_norm"),
    *("discriminator_start_step", "discriminator_warmup_steps", "discriminator_width", "discriminator_layers"),
)
"""Options of LPIPS and of the discriminator."""

MOST_VALUES = 10_000
"""Most values of a recipe."""

TRAINING_FIELDS = [item.name for item in fields(ETTTrainingArguments) if item.init]
TRAINING_DEFAULTS = {item.name: item.default for item in fields(ETTTrainingArguments)}


def available_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """
    Args:
        name: One of [`available_recipes`], or a YAML file.
        overrides: `section.field=value`, the value in YAML, for instance `training.learning_rate=1e-4`. An item of a
            list goes by its number, counted from 0: `data.filters.0.min_side=256`. A `data.source` takes the place of
            the recipe's mixture and, unless it is `scenes`, of the recipe's fields of scenes; a `model.path` takes the
            place of the fields of a new model; a `train` without the tokenizer, of what the file sets of its losses.

    Raises:
        ValueError: Recipe or field is unknown (with a suggestion), a value does not parse, or has another type or
            range than its field.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"There is no recipe '{name}'.{suggestion(name, available_recipes())} Or give a YAML file.")
    values = _read_yaml(path.read_bytes(), f"'{path}'") or {}
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' holds a {type(values).__name__}; a recipe is a mapping of fields to values.")
    given = {override.partition("=")[0] for override in overrides or []}
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"The override '{override}' has no value; write section.field=value.")
        value = _read_yaml(text, f"The value of the override '{override:.100}'")
        _set(values, key, value)
        if key == "data.source" and value is not None:
            values["data"]["mixture"] = None
            if value != "scenes":
                _remove(values["data"], "data", SCENE_FIELDS, given)
        training = values.get("training")
        freezes_tokenizer = key == "train" and isinstance(value, list) and "vision_tokenizer" not in value
        if freezes_tokenizer and isinstance(training, dict):
            # A loss at its default claims nothing, and `check_recipe` accepts it everywhere.
            changed = [name for name in VQ_LOSS if training.get(name) != TRAINING_DEFAULTS[name]]
            _remove(training, "training", (*changed, *CRITICS), given)
        if key == "model.visual_embedding" and value == "index":
            # Positions are a part of the projected codebook embeddings, which an index model does not have.
            _remove(values["model"], "model", ("code_positions",), given)
        if key == "model.path" and value is not None:
            size = () if values.get("task") == "reconstruction" else ("image_size",)
            _remove(values["model"], "model", (*PARTS_OF_A_NEW_MODEL, *size), given)
    recipe = _build(Recipe, values, "")
    recipe.data.mixture = _typed_mixture(recipe.data.mixture)
    hints = field_hints(ETTTrainingArguments)
    for key, value in recipe.training.items():
        if key not in TRAINING_FIELDS:
            unknown = f"training.{key}"
            raise ValueError(f"The recipe has an unknown field '{unknown:.100}'.{suggestion(key, TRAINING_FIELDS)}")
        value = typed(f"training.{key}", value, hints[key])
        # Options that transformers hands on are typed nowhere: what looks like a number is one.
        recipe.training[key] = _number(value) if isinstance(value, dict) else value
    return recipe


def _read_yaml(text: str | bytes, subject: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # Beside YAMLError, whatever the constructors of numbers and dates raise.
        raise ValueError(f"{subject} is no YAML: {' '.join(str(error).split()):.300}") from error
    if not _has_at_most(MOST_VALUES, value):
        raise ValueError(
            f"{subject} holds more than {MOST_VALUES} values, since aliases repeat some or contain themselves; write "
            "out what a recipe needs."
        )
    return value


def _has_at_most(count: int, value: Any) -> bool:
    """Whether a nested value has no more parts, counting one that stands in several places there."""
    left, seen = [value], 0
    while left and seen <= count:
        part, seen = left.pop(), seen + 1
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set)):
            left += part
    return seen <= count


def _remove(section: dict[str, Any], prefix: str, names: Sequence[str], given: set[str]):
    """Removes what the recipe's file says of fields that an override has taken the place of."""
    for name in names:
        path = f"{prefix}.{name}"
        if not any(key == path or key.startswith(f"{path}.") for key in given):
            section.pop(name, None)


def _set(values: dict[str, Any], path: str, value: Any):
    """Puts a value where the path leads. Sections on the way are made; items of a list have to be there."""
    *sections, last = path.split(".")
    target: Any = values
    for section in sections:
        if isinstance(target, dict):
            # A section that a recipe leaves empty is null.
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
        else:
            target = target[_item(target, section, path)]
        if not isinstance(target, (dict, list)):
            raise ValueError(f"The override of '{path}' goes into '{section}', which is no section.")
    target[last if isinstance(target, dict) else _item(target, last, path)] = value


def _item(items: list[Any], number: str, path: str) -> int:
    if not number.isdecimal() or int(number) >= len(items):
        raise ValueError(
            f"The override of '{path}' goes into a list of {len(items)} items as '{number}'; count them from 0."
        )
    return int(number)


def _build(section_class: type, values: dict[str, Any], prefix: str) -> Any:
    known = {item.name: item for item in fields(section_class)}
    hints = field_hints(section_class)
    built = {}
    for key, value in values.items():
        if key not in known:
            unknown = f"{prefix}{key}"
            raise ValueError(f"The recipe has an unknown field '{unknown:.100}'.{suggestion(key, list(known))}")
        default = known[key].default_factory
        if prefix == "" and default in (dict, ModelSection, DataSection, LoraSection):
            # A section that a recipe leaves empty is null.
            value = {} if value is None else value
            if not isinstance(value, dict):
                raise ValueError(f"The recipe's '{key}' is {value!r:.100}; it is a section of fields.")
        if isinstance(default, type) and is_dataclass(default):
            value = _build(default, value, f"{prefix}{key}.")
        elif not (prefix == "data." and key == "mixture"):
            value = typed(f"{prefix}{key}", value, hints[key])
        built[key] = value
    return section_class(**built)


def _typed_mixture(mixture: Any) -> dict[str, dict[str, Any]] | None:
    """The mixture with the values that its fields take.

    Raises:
        ValueError: It is no mapping of names to sections with known fields, or a value has another type.
    """
    if mixture is None:
        return None
    if not isinstance(mixture, dict) or not all(isinstance(entry, dict) for entry in mixture.values()):
        raise ValueError(
            f"The recipe's 'data.mixture' is {mixture!r:.100}; it is a mapping of names to sections such as "
            "{source: FOLDER, weight: 2}."
        )
    hints = field_hints(DataSection) | {"weight": float}
    for name, entry in mixture.items():
        for key, value in entry.items():
            if key not in MIXTURE_FIELDS:
                unknown = f"data.mixture.{name}.{key}"
                raise ValueError(f"The recipe has an unknown field '{unknown:.100}'.{suggestion(key, MIXTURE_FIELDS)}")
            known_as = key if key == "weight" else f"data.{key}"
            entry[key] = typed(f"data.mixture.{name}.{key}", value, hints[key], known_as)
    return mixture


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


__all__ = ["DataSection", "LoraSection", "ModelSection", "Recipe", "available_recipes", "load_recipe"]
