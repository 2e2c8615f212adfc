"""Which recipes may learn from folders of codes, which `ett tokenize` wrote."""

import logging
from typing import Any

from ett.common_ett.model_folders import require_model_folder
from ett.data_ett.codes import TOKENIZATION_NAME, fit_of_codes, is_tokenized, read_tokenization
from ett.data_ett.fingerprint import folder_fingerprint, preprocessing
from ett.data_ett.shards import require_shards
from ett.processing_ett import ETTImageProcessor

from .examples import source_section
from .recipes import ModelSection, Recipe

logger = logging.getLogger(__name__)


def check_tokenized_data(recipe: Recipe):
    """Looks at folders of codes that a recipe names, before any model is loaded.

    Raises:
        ValueError: The stage needs pixels, the codes are another tokenizer's or of images prepared differently,
            files are missing or damaged, or codes and images would meet in a batch.
    """
    data = recipe.data
    sections = [source_section(data, entry) for entry in data.mixture.values()] if data.mixture else [data]
    sources = [section.source for section in sections if section.source is not None]
    tokenized = [source for source in sources if is_tokenized(source)]
    if not tokenized or not recipe.learns.has_images:
        return
    if recipe.learns.is_of_tokenizer or "vision_tokenizer" in recipe.train:
        raise ValueError(
            f"'{tokenized[0]}' holds codes and no pixels: there is nothing to reconstruct, and this stage trains the "
            "tokenizer. Give the images that the codes were made of."
        )
    others = [source for source in sources if source not in tokenized]
    if others and not data.in_memory:
        raise ValueError(
            f"'{tokenized[0]}' holds codes and '{others[0]}' images, which cannot share a batch; tokenize that one, "
            "too, or set data.in_memory=true, which makes its images codes before training."
        )
    fits = {source: fit_of_codes(read_tokenization(source)) for source in tokenized}
    if len(set(fits.values())) > 1:
        told = ", ".join(f"'{source}' with fit={fit}" for source, fit in fits.items())
        raise ValueError(f"The codes of this recipe were made in several ways: {told}; tokenize again with one --fit.")
    if data.fit not in (None, fits[tokenized[0]]):
        logger.warning(
            "data.fit is %s, but the codes in '%s' were made with fit=%s, which the model takes over; `ett tokenize "
            "--fit %s` makes others.",
            data.fit,
            tokenized[0],
            fits[tokenized[0]],
            data.fit,
        )
    for source in tokenized:
        record = require_shards(source, TOKENIZATION_NAME, data.verify_codes)
        _check_fingerprint(source, record, recipe.model)


def _check_fingerprint(source: str, record: dict[str, Any], section: ModelSection):
    model = section.path or section.vision_tokenizer
    if not isinstance(model, str):
        raise ValueError(
            f"'{source}' holds codes of the tokenizer '{record['model']}', and this recipe starts with another or "
            "none; name that one as model.vision_tokenizer, or an ETT model with it as model.path."
        )
    require_model_folder(model, "ett" if section.path else "IBQModel")
    side = section.of_new("image_size")
    image_processor = (
        ETTImageProcessor.from_pretrained(model)
        if section.path
        else ETTImageProcessor(size={"height": side, "width": side})
    )
    # The model takes over how the images of the codes were fitted.
    image_processor.fit = fit_of_codes(record)
    expected = folder_fingerprint(model, image_processor)
    if record["fingerprint"] != expected:
        made, wanted = record["preprocessing"]["size"], preprocessing(image_processor)["size"]
        raise ValueError(
            f"The codes in '{source}' were made by '{record['model']}' of images of {made[0]} x {made[1]} pixels "
            f"(fingerprint {record['fingerprint'][:12]}); this recipe's tokenizer, '{model}' for {wanted[0]} x "
            f"{wanted[1]} pixels, has the fingerprint {expected[:12]} and would make others. Make them anew with "
            f"`ett tokenize {record['data_set']} FOLDER --model {model} --image-size {wanted[0]}`, or name the model "
            "that made these."
        )


__all__ = ["check_tokenized_data"]
