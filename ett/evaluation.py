"""Implementation of `ett evaluate` and `ett inspect-tokenizer`: check the arguments, load the models, measure."""

from pathlib import Path
from typing import Any

from . import evaluation_ett
from .evaluation_ett.common import write_json
from .inference import check_image_path, load_tokenizer

FIGURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tiff")


def evaluate_reconstruction(
    model: str, output: Path, image_size: int | None, data: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Measure the reconstructions of a tokenizer, alone or inside an ETT model, on a dataset.

    Args:
        model (`str`): Folder or Hub name of the tokenizer or ETT model.
        output (`Path`): JSON file to write.
        image_size (`int`, *optional*): Side of the square images, in pixels. Defaults to the model's image size.
        data (`dict`): Arguments of [`evaluation_ett.Images`]: `path`, `split`, `image_column`, `limit`.
        options: Further arguments of [`evaluation_ett.evaluate_data_set`].

    Returns:
        `dict`: The result that `output` holds.

    Raises:
        ValueError: If the output cannot be written, the model or dataset cannot be used, or the image size does not
            fit the tokenizer.
    """
    check_json_path(output)
    tokenizer, image_processor = load_tokenizer(model)
    size = evaluation_ett.choose_size(tokenizer, image_processor, image_size)
    images = evaluation_ett.Images(image_processor=image_processor, size=size, **data)
    return evaluation_ett.evaluate_data_set(tokenizer, images, output, model, **options)


def inspect_tokenizer(
    model: str,
    output: Path | None,
    image_size: int | None,
    data: dict[str, Any],
    logit_scale: float | None,
    straight_through_weight: float | None,
    batch_size: int,
) -> dict[str, Any]:
    """Measure the share of a gradient that reaches the encoder of a tokenizer, alone or inside an ETT model.

    Args:
        model (`str`): Folder or Hub name of the tokenizer or ETT model.
        output (`Path`, *optional*): JSON file to write.
        image_size (`int`, *optional*): Side of the square images, in pixels. Defaults to the model's image size.
        data (`dict`): Arguments of [`evaluation_ett.Images`]. The path `scenes` takes the first `limit` embedded
            scenes.
        logit_scale (`float`, *optional*): Replaces the tokenizer's own value.
        straight_through_weight (`float`, *optional*): Replaces the tokenizer's own value.
        batch_size (`int`): Images per batch.

    Returns:
        `dict`: The result of [`evaluation_ett.inspect_tokenizer`].

    Raises:
        ValueError: If the output cannot be written, the model or dataset cannot be used, a number is out of range, or
            the image size does not fit the tokenizer.
    """
    if output is not None:
        check_json_path(output)
    tokenizer, image_processor = load_tokenizer(model)
    tokenizer.set_gradient_path(logit_scale, straight_through_weight)
    size = evaluation_ett.choose_size(tokenizer, image_processor, image_size)
    if data["path"] == "scenes":
        images = evaluation_ett.SceneImages(image_processor, size, data["limit"])
    else:
        images = evaluation_ett.Images(image_processor=image_processor, size=size, **data)
    result = evaluation_ett.inspect_tokenizer(tokenizer.float(), images, model, batch_size)
    if output is not None:
        write_json(output, result)
    return result


def check_json_path(output: Path):
    """Raise `ValueError` if no JSON file can be written to this path."""
    if output.suffix != ".json":
        raise ValueError(f"{output} has no .json suffix; name a JSON file, such as reconstruction.json.")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name the JSON file to write.")
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {output.parent} to write {output.name} into; create it first.")


def compare_reconstructions(models: tuple[str, str], output: Path, image_size: int | None, data: dict[str, Any]):
    """Write a figure that compares the reconstructions of two tokenizers; see [`evaluation_ett.draw_comparison`].

    Args:
        models (`tuple[str, str]`): Folders or Hub names of two tokenizers or ETT models.
        output (`Path`): Image file to write.
        image_size (`int`, *optional*): Side of the square images, in pixels. Defaults to the first model's image size.
        data (`dict`): Arguments of [`evaluation_ett.Images`]. Without a `limit`, the figure shows four images.

    Raises:
        ValueError: As for [`evaluate_reconstruction`], and if both models are the same.
    """
    output = check_image_path(output, FIGURE_SUFFIXES)
    names = [Path(model).name for model in models]
    if names[0] == names[1]:
        names = models
    if models[0] == models[1]:
        raise ValueError(f"Both models to compare are {models[0]}; name two different models.")
    (before, image_processor), (after, _) = map(load_tokenizer, models)
    size = evaluation_ett.choose_size(before, image_processor, image_size)
    evaluation_ett.choose_size(after, image_processor, image_size)
    # The figure's limit counts readable images only, so `draw_comparison` applies it.
    images = evaluation_ett.Images(image_processor=image_processor, size=size, **{**data, "limit": None})
    tokenizers = dict(zip(names, (before, after), strict=True))
    evaluation_ett.draw_comparison(tokenizers, images, output, data["limit"] or 4)


__all__ = ["compare_reconstructions", "evaluate_reconstruction", "inspect_tokenizer"]
