"""Types and ranges of recipe values, checked when a recipe is loaded, before any work.

The types are the annotations of the recipe's dataclasses and of [`ETTTrainingArguments`]; the ranges stand below. YAML
reads `1e-4`, which has no dot, as text, and `no` as false; both are converted where the field expects a number or a
strategy.
"""

import math
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import IntervalStrategy, SchedulerType

LARGEST_INT = 2**53
"""Largest whole number of a recipe."""

LONGEST_LIST = 8
"""Choices that an error message lists in full."""

Range = tuple[str, Callable[[Any], bool]]

POSITIVE: Range = ("above 0", lambda value: value > 0)
NOT_NEGATIVE: Range = ("0 or above 0", lambda value: value >= 0)
SHARE: Range = ("from 0 to 1", lambda value: 0 <= value <= 1)
BETA: Range = ("from 0 to below 1", lambda value: 0 <= value < 1)
BETWEEN: Range = ("between 0 and 1", lambda value: 0 < value < 1)
WIDTH: Range = ("from 1 to 65536", lambda value: 0 < value <= 2**16)
STEPS: Range = ("above 0, or -1 for none", lambda value: value > 0 or value == -1)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        [
            *("model.codebook_size", "model.codebook_images", "model.image_size", "model.logit_scale"),
            *("data.length", "data.max_length", "data.shuffle_rows", "weight"),
            *("training.gradient_accumulation_steps", "training.global_batch_size", "training.critics_batch_size"),
            *("training.discriminator_layers", "training.peak_flops"),
            *("training.num_train_epochs", "training.logging_steps", "training.save_steps", "training.eval_steps"),
            *("training.save_total_limit", "training.adam_epsilon", "training.muon_rate_factor"),
            *("training.eval_accumulation_steps", "training.torch_empty_cache_steps", "training.ddp_timeout"),
            *("training.dataloader_prefetch_factor", "training.ddp_bucket_cap_mb"),
            *(
                f"model.vision_tokenizer.{name}"
                for name in (
                    *("in_channels", "out_channels", "layers_per_block", "latent_channels", "num_vq_embeddings"),
                    *("vq_embed_dim", "norm_num_groups", "patch_size", "pixel_std", "logit_scale"),
                )
            ),
        ],
        POSITIVE,
    ),
    **dict.fromkeys(
        [
            *("model.straight_through_weight", "data.questions_per_scene", "training.learning_rate"),
            *("training.warmup_steps", "training.weight_decay", "training.max_grad_norm", "training.seed"),
            *("training.data_seed", "training.dataloader_num_workers", "training.sample_steps"),
            *("training.discriminator_learning_rate", "training.discriminator_max_grad_norm"),
            *("training.discriminator_start_step", "training.discriminator_warmup_steps", "training.alpha"),
            *("training.squared_error_weight", "training.quantization_weight", "training.perceptual_weight"),
            *("training.adversarial_weight", "training.entropy_weight", "training.lecam_weight"),
            *("training.part_learning_rates", "training.part_max_grad_norms", "training.eval_delay"),
            "training.neftune_noise_alpha",
        ],
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(["data.prompt_dropout", "training.label_smoothing_factor"], SHARE),
    **dict.fromkeys(["training.adam_beta1", "training.adam_beta2"], BETA),
    "training.ema_decay": BETWEEN,
    "training.max_steps": STEPS,
    **dict.fromkeys(
        [
            *("training.discriminator_width", "lora.rank"),
            *("training.per_device_train_batch_size", "training.per_device_eval_batch_size"),
        ],
        WIDTH,
    ),
}
"""Ranges by the field's path; of a mapping, the range of each value. `weight` is a mixture's."""

CHOICES: dict[str, Any] = {
    "model.visual_embedding": Literal["codebook", "index"] | None,
    "data.fit": Literal["crop", "pad", "stretch"] | None,
    "training.lr_scheduler_type": SchedulerType,
    "training.discriminator_lr_scheduler_type": SchedulerType | None,
    "training.perceptual_network": Literal["vgg", "alex", "squeeze"],
    "training.train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    # The annotations of transformers are narrower than what it accepts.
    "training.fsdp": bool | str | list[str] | None,
    "training.debug": str | list[str],
    "training.parallelism_config": Any,
}
"""Types in place of the annotations."""

OFF = {"training.report_to": "none", "training.eval_strategy": IntervalStrategy.NO.value}
"""What `no`, which YAML reads as false, stands for in fields that are no strategy."""


class _UnfitError(ValueError):
    """The value is not of the type."""


def field_hints(section: type | Callable) -> dict[str, Any]:
    """The types of a dataclass's fields, or of a function's arguments, by name."""
    return {name: hint for name, hint in get_type_hints(section).items() if name != "return"}


def describe_type(key: str, annotation: Any) -> str:
    """The type of a field in words, with its range.

    >>> describe_type("training.seed", int)
    '0 or a whole number above 0'
    """
    return _describe(CHOICES.get(key, annotation), RANGES.get(key))


def typed(name: str, value: Any, annotation: Any, key: str | None = None) -> Any:
    """The value as its field takes it.

    Args:
        name: Path of the field in the recipe, for the error.
        annotation: Type of the field.
        key: Path by which `RANGES` and `CHOICES` know the field, by default `name`.

    Raises:
        ValueError: The value has another type, is out of range, or is no choice of the field.
    """
    key = name if key is None else key
    annotation = CHOICES.get(key, annotation)
    bounds = RANGES.get(key)
    if value is False and key in OFF:
        return OFF[key]
    try:
        value = _fit(value, annotation)
        numbers = value.values() if isinstance(value, dict) else [value]
        if bounds is not None and not all(bounds[1](number) for number in numbers if _is_number(number)):
            raise _UnfitError
    except _UnfitError:
        expected = describe_type(key, annotation)
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            expected += ", of at most 2^53"
        raise ValueError(f"{name} is {value!r:.100}; expected {expected}.") from None
    return value


def _fit(value: Any, annotation: Any) -> Any:
    """The value, converted where YAML has lost its type."""
    if annotation is Any:
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _fit_one_of(value, args)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise _UnfitError
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _fit_choice(value, [member.value for member in annotation])
    if annotation in (dict, list, tuple) or origin in (dict, list, tuple):
        return _fit_collection(value, origin or annotation, args)
    fit = {bool: _fit_bool, int: _fit_int, float: _fit_float, str: _fit_str, type(None): _fit_none}.get(annotation)
    if fit is not None:
        return fit(value)
    if isinstance(annotation, type) and not isinstance(value, annotation):
        raise _UnfitError
    return value


def _fit_one_of(value: Any, args: tuple[Any, ...]) -> Any:
    choices = [arg for arg in args if isinstance(arg, type) and issubclass(arg, Enum)]
    if choices:
        # Beside an enumeration transformers allows any text, and fails later.
        args = tuple(arg for arg in args if arg is not str)
    # A value that is of a type already is not converted to another: the text "42" stays a text.
    for arg in sorted(args, key=lambda arg: not (isinstance(arg, type) and type(value) is arg)):
        try:
            return _fit(value, arg)
        except _UnfitError:
            continue
    raise _UnfitError


def _fit_choice(value: Any, choices: list[Any]) -> Any:
    value = getattr(value, "value", value)
    if value is False and "no" in choices:
        return "no"
    if value not in choices or isinstance(value, bool):
        raise _UnfitError
    return value


def _fit_collection(value: Any, kind: type, args: tuple[Any, ...]) -> Any:
    if kind in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _UnfitError
        return [_fit(item, args[0]) for item in value] if args else list(value)
    if not isinstance(value, dict):
        raise _UnfitError
    return {name: _fit(item, args[1]) for name, item in value.items()} if args else dict(value)


def _fit_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _UnfitError
    return value


def _fit_float(value: Any) -> int | float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _UnfitError from None
    if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)):
        raise _UnfitError
    return value


def _fit_int(value: Any) -> int:
    value = _fit_float(value)
    if value != int(value) or abs(value) > LARGEST_INT:
        raise _UnfitError
    return int(value)


def _fit_str(value: Any) -> str:
    # A name of digits alone, such as run_name: 42. Other numbers have lost how they were written.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _UnfitError
    return value


def _fit_none(value: Any) -> None:
    if value is not None:
        raise _UnfitError


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _describe(annotation: Any, bounds: Range | None = None) -> str:
    """The type in words, with its range: `a whole number above 0, or null`."""
    args = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        is_choice = any(isinstance(arg, type) and issubclass(arg, Enum) for arg in args)
        kinds = [arg for arg in args if arg is not type(None) and not (is_choice and arg is str)]
        return " or ".join(_describe(arg, bounds) for arg in kinds) + (", or null" if type(None) in args else "")
    if get_origin(annotation) is Literal:
        return _describe_choices(list(args))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _describe_choices([member.value for member in annotation])
    kind = get_origin(annotation) or annotation
    if kind in (list, tuple):
        return f"a list of {_describe_plural(args[0])}" if args else "a list"
    if kind is dict:
        return f"a mapping of names to {_describe_plural(args[1], bounds)}" if args else "a mapping"
    if kind in (int, float):
        noun = "whole number" if kind is int else "number"
        if bounds is NOT_NEGATIVE:
            return f"0 or a {noun} above 0"
        return f"a {noun}{f' {bounds[0]}' if bounds else ''}"
    return {str: "text", bool: "true or false"}.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _describe_plural(annotation: Any, bounds: Range | None = None) -> str:
    noun = {str: "texts", int: "whole numbers", float: "numbers"}.get(annotation)
    if noun is None:
        return "mappings" if (get_origin(annotation) or annotation) is dict else "values"
    return noun if bounds is None else f"{noun}, {bounds[0]}"


def _describe_choices(choices: list[Any]) -> str:
    shown = ", ".join(str(choice) for choice in choices[:LONGEST_LIST])
    return f"one of {shown}{' and others' if len(choices) > LONGEST_LIST else ''}"


__all__ = ["describe_type", "field_hints", "typed"]
