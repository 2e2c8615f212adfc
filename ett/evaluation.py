"""What `ett evaluate` and `ett inspect-tokenizer` do: check all that can be wrong, load models, hand them to the
measurements."""

from pathlib import Path
from typing import Any

from . import evaluation_ett
from .evaluation_ett.common import write_json
from .inference import check_image_path, load_tokenizer

FIGURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tiff")


def evaluate_reconstruction(
    model: str, output: Path, image_size: int | None, data: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Measures a tokenizer, by itself or inside an ETT model, on a dataset.

    Args:
        image_size: Side of the images, in pixels, by default as the model says.
        data: Of [`evaluation_ett.Images`]: `path`, `split`, `image_column`, `limit`.
        options: Of [`evaluation_ett.evaluate_data_set`].

    Raises:
        ValueError: The output cannot be written, the model or the dataset cannot be used, or the size does not fit.
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
    """Measures whether captions can tune a tokenizer, by itself or inside an ETT model.

    Args:
        output: JSON file to write, if any.
        image_size: Side of the images, in pixels, by default as the model says.
        data: Of [`evaluation_ett.Images`]; the path `scenes` is for the embedded scenes, of which the first `limit`
            are taken.
        logit_scale, straight_through_weight: In place of the tokenizer's own.

    Raises:
        ValueError: The output cannot be written, the model or the dataset cannot be used, a number is out of range, or
            the size does not fit.
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
    """Raises `ValueError` where no JSON file of that name can be written."""
    if output.suffix != ".json":
        raise ValueError(f"{output} is not named like a JSON file; name one, such as reconstruction.json.")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name the JSON file to write.")
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {output.parent} to write {output.name} into.")


def compare_reconstructions(models: tuple[str, str], output: Path, image_size: int | None, data: dict[str, Any]):
    """Draws what two tokenizers make of the same images, `limit` of `data` or four, at the first one's size or
    `image_size`; see [`evaluation_ett.draw_comparison`].

    Raises:
        ValueError: As for [`evaluate_reconstruction`], or both models are the same.
    """
    output = check_image_path(output, FIGURE_SUFFIXES)
    names = [Path(model).name for model in models]
    if names[0] == names[1]:
        names = models
    if models[0] == models[1]:
        raise ValueError(f"Both models to compare are {models[0]}; name two different ones.")
    (before, image_processor), (after, _) = map(load_tokenizer, models)
    size = evaluation_ett.choose_size(before, image_processor, image_size)
    evaluation_ett.choose_size(after, image_processor, image_size)
    # Those that cannot be read are not counted among the images of a figure.
    images = evaluation_ett.Images(image_processor=image_processor, size=size, **{**data, "limit": None})
    tokenizers = dict(zip(names, (before, after), strict=True))
    evaluation_ett.draw_comparison(tokenizers, images, output, data["limit"] or 4)


__all__ = ["compare_reconstructions", "evaluate_reconstruction", "inspect_tokenizer"]
