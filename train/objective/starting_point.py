"""The discriminator that a stage starts from, and the one that its finished folder passes to the next stage."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..arguments import ETTTrainingArguments
from ..recipes import ModelSection, Recipe
from .adversary import Adversary
from .discriminator import (
    DISCRIMINATOR_NAME,
    PatchDiscriminator,
    check_discriminator,
    discriminator_size,
    load_discriminator,
)

NEW = "new"


@dataclass(frozen=True)
class DiscriminatorStart:
    """Where the discriminator of a run comes from, and when it takes part.

    Args:
        path: File that it continues, or None for a new discriminator.
        width, layers: Its size.
        first_step: Step from which it learns.
        counted_step: Step from which its loss counts for the tokenizer.
        trained_tokenizer: Folder or Hub name of the tokenizer beside it, or None for a new tokenizer.
    """

    path: Path | None
    width: int
    layers: int
    first_step: int
    counted_step: int
    trained_tokenizer: str | None

    @property
    def warning(self) -> str | None:
        """A sentence with the remedy where a new discriminator acts on a trained tokenizer from its first step."""
        if self.path is not None or self.trained_tokenizer is None or self.counted_step > self.first_step:
            return None
        return (
            f"A new discriminator starts beside the trained tokenizer of '{self.trained_tokenizer}': let it learn "
            "first (training.discriminator_warmup_steps), or continue a trained one (model.discriminator=FILE)."
        )

    def describe(self) -> list[str]:
        """Lines for the plan of a run."""
        start = "a new discriminator" if self.path is None else f"continues '{self.path}'"
        lines = [
            f"{start} (width {self.width}, {self.layers} layers)",
            f"learns from step {self.first_step:,}; its loss counts from step {self.counted_step:,}",
        ]
        return lines if self.warning is None else [*lines, self.warning]

    def load(self) -> PatchDiscriminator | None:
        """The discriminator of the file, or None for a new one."""
        return None if self.path is None else load_discriminator(self.path, self.width, self.layers)


def find_discriminator(recipe: Recipe, args: ETTTrainingArguments) -> DiscriminatorStart | None:
    """The starting point of a recipe's discriminator, or None for a stage without one. No tensor is read.

    Raises:
        ValueError: The recipe names a discriminator for a stage that trains none, or the file does not fit.
    """
    section = recipe.model
    if "vision_tokenizer" not in recipe.train or not args.adversarial_weight:
        if section.discriminator is not None:
            raise ValueError(
                "model.discriminator is given, but this stage trains none: that needs vision_tokenizer in train and "
                "training.adversarial_weight above 0."
            )
        return None
    width, layers = args.discriminator_width, args.discriminator_layers
    if section.discriminator is None:
        path = _discriminator_of_folder(section)
    else:
        path = None if section.discriminator == NEW else Path(section.discriminator)
    if path is not None:
        check_discriminator(path, width, layers)
    first = args.discriminator_start_step
    return DiscriminatorStart(
        path, width, layers, first, first + args.discriminator_warmup_steps, _starting_folder(section)
    )


def passed_on_discriminator(recipe: Recipe) -> Path | None:
    """The file that the finished folder of a stage without a discriminator passes on, or None.

    Raises:
        ValueError: The file of the starting folder holds no discriminator.
    """
    path = _discriminator_of_folder(recipe.model) if recipe.learns.keeps_discriminator else None
    if path is not None:
        discriminator_size(path)
    return path


def save_discriminator(
    folder: Path, adversary: Adversary | None, steps: int, source: Path | None
) -> dict[str, int] | None:
    """Writes `discriminator.safetensors` beside a finished model: the discriminator that the run trained, or else a
    copy of the file that it started from.

    Args:
        steps: Steps of the finished run.
        source: File that the run started from or passes on.

    Returns:
        Width and layers of the discriminator for the training record, or None where the folder has none.
    """
    if adversary is not None and adversary.learns_at(steps - 1):
        adversary.save_weights(folder)
    elif source is not None:
        shutil.copyfile(source, folder / DISCRIMINATOR_NAME)
    else:
        return None
    return dict(zip(("width", "layers"), discriminator_size(folder / DISCRIMINATOR_NAME), strict=True))


def _starting_folder(section: ModelSection) -> str | None:
    """Folder or Hub name with the trained tokenizer that a stage starts from, or None for a new tokenizer."""
    source = section.path or section.vision_tokenizer
    return source if isinstance(source, str) else None


def _discriminator_of_folder(section: ModelSection) -> Path | None:
    source = _starting_folder(section)
    path = None if source is None else Path(source) / DISCRIMINATOR_NAME
    return path if path is not None and path.is_file() else None


__all__ = ["DiscriminatorStart", "find_discriminator", "passed_on_discriminator", "save_discriminator"]
