"""A tokenizer measured on a whole dataset of images, as papers do it.

- Images are resized to just cover the size (bilinear) and cropped around the centre; all is computed in float32.
- Memory does not grow with the number of images: there are running sums alone.
- An interrupted run goes on from a file beside the result, and ends with exactly the result of an uninterrupted one.
- The result holds every setting that moves a number.
"""

import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ett.data_ett.image_rows import image_name, load_rows, open_images
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor, ImageError
from ett.scenes_ett import Scenes

from .common import evaluating, write_json
from .measures import Measures
from .networks import Judges, build_judges, hash_module
from .reconstruction import encode_decode

logger = logging.getLogger(__name__)

MIN_IMAGE_SIZE = 32
"""Smallest side, in pixels, on which every measure is defined (AlexNet's features end there)."""

LIBRARIES = ("datasets", "diffusers", "lpips", "pillow", "pytorch-fid", "torch", "torchmetrics", "torchvision")

METRICS = {
    "images": ("Images", "{:,}"),
    "rfid": ("rFID", "{:.3f}"),
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips_alex": ("LPIPS (AlexNet)", "{:.4f}"),
    "lpips_vgg": ("LPIPS (VGG)", "{:.4f}"),
    "codebook_usage": ("Codebook usage", "{:.2%}"),
    "perplexity": ("Perplexity", "{:,.1f}"),
}
"""Every metric in the order in which it is shown, its name and its form."""

SKIPPED_SHOWN = 5

Size = tuple[int, int]
Unreadable = dict[str, Any]
"""Of an image that cannot be read its `row`, `name` and the `reason`."""


class Images(Dataset):
    """The images of a dataset, in its order, as a tokenizer takes them.

    Args:
        path (`str`): A folder of images, or any dataset that [`datasets.load_dataset`] takes.
        image_processor ([`ETTImageProcessor`]): Its size and resampling filter give way to these:
        size (`(int, int)`): Height and width, in pixels.
        split (`str`, *optional*): Without it, the only one there is.
        limit (`int`, *optional*): Only that many of the first rows.

    An item is a `torch.Tensor` of shape `(3, height, width)` in `[-1, 1]`, or of an image that cannot be read a dict
    of its `row`, its `name` and the `reason`.

    Raises:
        ValueError: The dataset cannot be read or is empty, or the column is missing or holds no images.
    """

    def __init__(
        self,
        path: str,
        image_processor: ETTImageProcessor,
        size: Size,
        split: str | None = None,
        image_column: str = "image",
        limit: int | None = None,
    ):
        rows = load_rows(path, split, image_column, (image_column,), "--image-column")
        self.rows = rows.select(range(min(limit or len(rows), len(rows))))
        self.path, self.image_column, self.size = path, image_column, size
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor | Unreadable:
        cell = self.rows[index][self.image_column]
        try:
            images = open_images(cell)
            if len(images) != 1:
                raise ImageError(f"The row holds {len(images)} images; expected one.")
        except ImageError as error:
            return {"row": index, "name": image_name(cell, index), "reason": str(error)}
        return to_size(images[0], self.image_processor, self.size)

    def settings(self) -> dict[str, Any]:
        """Which images these are and what was done to them."""
        return {
            "data_set": self.path,
            "data_fingerprint": self.rows._fingerprint,
            "split": str(self.rows.split),
            "image_column": self.image_column,
            "rows": len(self),
            **size_settings(self.size),
        }


class SceneImages(Dataset):
    """Images of the embedded scenes that training does not see, as [`Images`] gives those of a dataset.

    Args:
        image_processor ([`ETTImageProcessor`]): As for [`Images`].
        size (`(int, int)`): Height and width, in pixels.
        limit (`int`): Number of images.
    """

    path, split = "scenes", "test"

    def __init__(self, image_processor: ETTImageProcessor, size: Size, limit: int):
        self.scenes = Scenes(0, self.split, limit)
        self.image_processor, self.size = image_processor, size

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_size(self.scenes[index].render(), self.image_processor, self.size)

    def settings(self) -> dict[str, Any]:
        """As [`Images.settings`]."""
        return {"data_set": self.path, "split": self.split, "rows": len(self), **size_settings(self.size)}


def to_size(image: Image.Image, image_processor: ETTImageProcessor, size: Size) -> torch.Tensor:
    """An image to pixels of shape `(3, height, width)` in `[-1, 1]`, resized and cropped as [`size_settings`] says."""
    options = {
        "size": dict(zip(("height", "width"), size, strict=True)),
        "resample": Image.Resampling.BILINEAR,
        "fit": "crop",
    }
    return image_processor([image], **options, return_tensors="pt")["pixel_values"][0]


def size_settings(size: Size) -> dict[str, Any]:
    """What is done to every image to bring it to a size, for the record."""
    return {
        "image_size": list(size),
        "resize": "bilinear, antialiased (Pillow), to just cover image_size (height, width)",
        "fit": "crop",
        "crop": "centre, in one step with the resizing (Pillow's ImageOps.fit)",
    }


def choose_size(tokenizer: IBQModel, image_processor: ETTImageProcessor, image_size: int | None) -> Size:
    """Height and width, in pixels, at which a tokenizer is measured: `image_size`, or what its processor says.

    Raises:
        ValueError: A side is no multiple of the tokenizer's factor, or too small to be measured.
    """
    processor_size = image_processor.size["height"], image_processor.size["width"]
    size = (image_size, image_size) if image_size else processor_size
    factor = tokenizer.spatial_factor
    if any(side % factor or side < MIN_IMAGE_SIZE for side in size):
        raise ValueError(
            f"The image size is {size[0]} x {size[1]} (height x width); this tokenizer is measured with sides that "
            f"are multiples of {factor} and at least {MIN_IMAGE_SIZE}. Give another one with --image-size."
        )
    return size


def evaluate_data_set(
    tokenizer: IBQModel,
    images: Images,
    output: Path,
    model: str,
    batch_size: int = 8,
    workers: int = 0,
    save_every: int = 500,
    resume: bool = True,
    judges: Judges | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a tokenizer and writes `output`, a JSON file; beside it lies the state of an unfinished run.

    Args:
        tokenizer ([`IBQModel`]): Becomes float32.
        model (`str`): Its name, for the record.
        workers (`int`): Processes that read images; 0 reads them in this one.
        save_every (`int`): After how many images, at least, the state is written.
        resume (`bool`): Go on from a state; otherwise it is thrown away.
        judges ([`Judges`], *optional*): By default all whose weights can be had.

    Returns:
        `metrics` ([`Measures.results`], where PSNR and SSIM are of images truncated to 8 bits, with `None` for what
        is missing); `missing`, {metric: what to put where}; `skipped`, a list of {row, name, reason}; `settings`.

    Raises:
        ValueError: The state is of other settings or damaged, or none of the images can be read.
    """
    tokenizer = tokenizer.float()
    judges = judges or build_judges()
    for name, sentence in judges.missing.items():
        logger.warning("%s will not be measured. %s", METRICS[name][0], sentence)
    settings = {
        "model": model,
        "weights_sha256": hash_module(tokenizer),
        "model_config": {name: value for name, value in tokenizer.config.items() if not name.startswith("_")},
        "codebook_size": tokenizer.config.num_vq_embeddings,
        **images.settings(),
        "batch_size": batch_size,
        "dtype": "float32",
        "device": tokenizer.device.type,
        "psnr_ssim": "of images truncated to 8 bits; SSIM with a Gaussian window of 11 pixels, sigma 1.5",
        **judges.settings,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    measures = Measures(tokenizer.config.num_vq_embeddings, True, judges.networks, tokenizer.device)
    run = _Run(output.with_suffix(".state.safetensors"), measures, settings)
    if resume:
        run.load()
    loader = DataLoader(
        Subset(images, range(run.position, len(images))), batch_size, num_workers=workers, collate_fn=list
    )
    # Convolutions in TF32 would move codes; algorithms chosen anew would move last digits between runs.
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    bar = tqdm(desc="Reconstruction", unit=" images", disable=not progress, total=len(images), initial=run.position)
    with evaluating(tokenizer), exact, bar:
        for items in loader:
            readable = [item for item in items if isinstance(item, torch.Tensor)]
            run.skipped += [item for item in items if not isinstance(item, torch.Tensor)]
            if readable:
                originals = torch.stack(readable).to(tokenizer.device)
                codes, reconstructions = encode_decode(tokenizer, originals)
                measures.add(originals, reconstructions, codes)
                bar.set_postfix_str(f"PSNR {measures.mean('psnr'):.2f} dB", refresh=False)
            run.position += len(items)
            bar.update(len(items))
            if run.position - run.saved >= save_every:
                run.save()
    if run.position > run.saved:
        run.save()
    if not measures.count:
        run.remove()
        raise none_readable(images, run.skipped)
    metrics = {**measures.results(), **dict.fromkeys(judges.missing)}
    result = {"metrics": metrics, "missing": judges.missing, "skipped": run.skipped, "settings": run.settings}
    write_json(output, result)
    run.remove()
    return result


def none_readable(images: Images, skipped: list[Unreadable]) -> ValueError:
    """The error where all images were skipped."""
    first = skipped[0]
    return ValueError(
        f"None of the {len(images)} images of '{images.path}' can be read; the first, {first['name']}: "
        f"{first['reason']}"
    )


def describe(result: dict[str, Any]) -> str:
    """What [`evaluate_data_set`] returns as a short table, with what is missing and what was skipped below it."""
    lines = []
    for metric, (name, form) in METRICS.items():
        value = result["metrics"][metric]
        lines.append(f"{name:<16}{'not measured' if value is None else form.format(value)}")
    lines += [f"No {METRICS[metric][0]}: {sentence}" for metric, sentence in result["missing"].items()]
    return "\n".join(lines + describe_skipped(result))


def describe_skipped(result: dict[str, Any], file: str = "the JSON file") -> list[str]:
    """Lines on the `skipped` images of a result, the first few by name; `file` names all."""
    skipped, lines = result["skipped"], []
    if skipped:
        lines.append(f"Skipped {len(skipped)} of {result['settings']['rows']} images:")
        lines += [f"  {image['name']}: {image['reason']}" for image in skipped[:SKIPPED_SHOWN]]
    if len(skipped) > SKIPPED_SHOWN:
        lines.append(f"  and {len(skipped) - SKIPPED_SHOWN} more, all named in {file}.")
    return lines


class _Run:
    """How far a run is, and the file that it can be taken up from: the sums as tensors, the rest as JSON in its
    header, so that one rename makes all of it valid at once."""

    def __init__(self, path: Path, measures: Measures, settings: dict[str, Any]):
        self.path, self.measures = path, measures
        self.partial = path.with_name(f".{path.name}.partial")
        self.settings = json.loads(json.dumps(settings))
        self.position = self.saved = 0
        self.skipped: list[Unreadable] = []

    def save(self):
        record = {"settings": self.settings, "position": self.position, "skipped": self.skipped}
        save_file(self.measures.state(), self.partial, metadata={"run": json.dumps(record)})
        os.replace(self.partial, self.path)
        self.saved = self.position

    def load(self):
        """Takes up the state, if there is one. Raises `ValueError` where it is damaged or of other settings."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                record = json.loads(file.metadata()["run"])
                state = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"The state of an unfinished run, {self.path}, is damaged ({error}); give --no-resume to start anew."
            ) from error
        if differences := _differences(record["settings"], self.settings):
            raise ValueError(
                f"{self.path} is the state of an unfinished run with other settings: {'; '.join(differences)}. Run "
                "that command again, or give --no-resume to throw it away and start anew."
            )
        self.measures.load_state(state)
        self.position = self.saved = record["position"]
        self.skipped = record["skipped"]

    def remove(self):
        for path in (self.path, self.partial):
            path.unlink(missing_ok=True)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Each setting that differs, by its name, with what it was and what it is."""
    differences = []
    for name in dict.fromkeys((*old, *new)):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            differences += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            differences.append(f"{prefix}{name} was {json.dumps(before)} and is {json.dumps(now)}")
    return differences


__all__ = ["METRICS", "Images", "SceneImages", "choose_size", "describe", "evaluate_data_set"]
