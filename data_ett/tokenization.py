"""Images of a dataset to image codes, once, for every stage that leaves the tokenizer as it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor, ImageError

from .codes import CODES_FEATURES, FORMAT, TOKENIZATION_NAME, codes_to_row
from .fingerprint import fingerprint, preprocessing
from .image_rows import image_name, load_rows, open_images
from .preparation import image_levels, replace_pixels
from .shards import Part, ShardsReport, Skipped, write_shards


class ImageRows(Dataset):
    """Rows of a dataset: `row`, all columns but that of the images, and where there are images `pixel_values`
    `(num_images, 3, H, W)` of uint8; or a [`Skipped`]."""

    def __init__(self, rows: datasets.Dataset, image_column: str, image_processor: ETTImageProcessor):
        self.rows, self.image_column, self.image_processor = rows, image_column, image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        row = self.rows[index]
        cell = row.pop(self.image_column)
        try:
            images = open_images(cell)
        except ImageError as error:
            return Skipped(image_name(cell, index), str(error))
        return {"row": row, **image_levels(images, self.image_processor)}


def tokenize_data_set(
    data_set: str,
    output: str | Path,
    tokenizer: IBQModel,
    image_processor: ETTImageProcessor,
    model: str,
    split: str | None = None,
    image_column: str = "image",
    image_folder: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    rows_per_shard: int = 10_000,
    part: Part | None = None,
    progress: bool = True,
) -> ShardsReport:
    """Writes a dataset's rows with the codes of their images in place of these: a source for training.

    Args:
        data_set: A folder of images, or any dataset that [`datasets.load_dataset`] takes. A row has an image, a
            list of them or none; one with an image that cannot be read is left out and named in the manifest.
        tokenizer: In float32, in evaluation mode, on the device that is to do the work.
        model: Its name, for the record.
        split: Without it, the only one there is.
        image_folder: Folder to which images' file names are relative, by default that of the data.
        limit: Only that many of the first rows.
        batch_size: Rows whose images are encoded together.
        workers: Processes that read images; 0 reads them in this one.
        part: Which of the shards are this machine's, by default all of them.

    Raises:
        ValueError: The dataset cannot be used, images do not divide into codes, or `output` holds something else.
    """
    size = preprocessing(image_processor)["size"]
    if any(side % tokenizer.spatial_factor for side in size):
        raise ValueError(
            f"The image size is {size[0]} x {size[1]} (height x width); this tokenizer needs sides that are multiples "
            f"of {tokenizer.spatial_factor}. Give another one with --image-size."
        )
    rows = load_rows(data_set, split, image_column, (image_column,), "--image-column", image_folder)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    others = {name: feature for name, feature in rows.features.items() if name != image_column}
    if taken := sorted(set(others) & set(CODES_FEATURES)):
        raise ValueError(f"'{data_set}' has a column {taken[0]!r} already; rename it.")
    num_codes = tokenizer.config.num_vq_embeddings
    images = ImageRows(rows, image_column, image_processor)
    num_images = 0

    def make_rows(numbers: range) -> Iterator[dict[str, Any] | Skipped]:
        nonlocal num_images
        for items in DataLoader(Subset(images, numbers), batch_size, num_workers=workers, collate_fn=list):
            replace_pixels([item for item in items if isinstance(item, dict)], tokenizer)
            for item in items:
                if isinstance(item, dict):
                    codes = item.get("image_codes")
                    num_images += 0 if codes is None else len(codes)
                    item = {**item["row"], **codes_to_row(codes)}
                yield item

    settings = {
        "format": FORMAT,
        "fingerprint": fingerprint(tokenizer, image_processor),
        "num_codes": num_codes,
        "model": model,
        "preprocessing": preprocessing(image_processor),
        "data_set": data_set,
        "split": split,
        "image_column": image_column,
    }
    with torch.inference_mode():
        report = write_shards(
            output,
            len(rows),
            make_rows,
            datasets.Features({**others, **CODES_FEATURES}),
            TOKENIZATION_NAME,
            settings,
            rows_per_shard,
            part,
            progress,
        )
    report.images = num_images
    return report


__all__ = ["ImageRows", "tokenize_data_set"]
