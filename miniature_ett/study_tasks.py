"""Tasks of the study, each a function that a worker of [`miniature_ett.schedule`] calls: training, measuring, drawing.

- A training task leaves a finished stage folder; the checkpoints in it are removed.
- A measuring task leaves one small JSON file, a cell. The file is there in whole or not at all.
"""

import errno
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from ett import evaluation_ett, train
from ett.evaluation_ett.common import write_json
from ett.evaluation_ett.networks import RandomSqueezeFeatures
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTProcessor
from ett.scenes_ett import PROMPT_CATEGORIES, QUESTION_TYPES, Scene, Scenes, drawing_pair
from ett.train.checkpointing.checkpoints import CheckpointError
from ett.train.checkpointing.folders import WORK_FOLDER

from .probe import probe_tokenizer
from .schedule import Report, StopTasks, peak_memory_gb

GENERAL_QUESTIONS = tuple(name for name in QUESTION_TYPES if name != "reading")
"""Question types that stand for the paper's general benchmarks; `reading` stands for TextVQA."""

SHEET_IMAGES = 6
DIGITS = 5


def train_stage(report: Report, recipe: str, overrides: list[str], folder: Path):
    """Trains a stage, or goes on with it, and removes its checkpoints."""
    _be_quiet()
    with _stopping_at_a_full_disk(folder):
        train.run_recipe(recipe, overrides, folder, progress=False, callbacks=[_ReportCallback(report)])
        record = train.read_record(folder)
        train.write_record(folder, {"peak_memory_gb": peak_memory_gb(), **record})
        for checkpoint in (folder / WORK_FOLDER).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def extract_tokenizer(report: Report, model: Path, folder: Path):
    """Writes the vision tokenizer of an ETT model as a tokenizer folder."""
    _be_quiet()
    with _stopping_at_a_full_disk(folder):
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        ETTForConditionalGeneration.from_pretrained(model).model.vision_tokenizer.save_pretrained(partial)
        os.replace(partial, folder)


def measure_cell(
    report: Report,
    path: Path,
    cell: dict[str, Any],
    kind: str,
    tuned: bool,
    stages: dict[str, Path],
    sizes: dict[str, Any],
):
    """Measures the models of a cell and writes its file.

    Args:
        cell: `ground`, `seed` and other fields that the file repeats.
        kind: What to measure: a key of [`MEASUREMENTS`].
        tuned: Whether stage 2 changed the tokenizer, which is then measured, too.
        stages: Folders of the cell's own stages: `tokenizer`, `semantic`, `chat` or `generation`.
        sizes: `MEASURING` of [`miniature_ett.study_matrix`].
    """
    _be_quiet()
    start = time.monotonic()
    measures = MEASUREMENTS[kind](stages, cell["ground"], cell["seed"], tuned, sizes)
    records = {name: train.read_record(folder) for name, folder in stages.items()}
    seconds = {name: record["seconds"] for name, record in records.items()}
    seconds["measuring"] = time.monotonic() - start
    peak = max(peak_memory_gb(), *(record.get("peak_memory_gb", 0.0) for record in records.values()))
    with _stopping_at_a_full_disk(path):
        write_cell(
            path,
            {
                **cell,
                "status": "done",
                "versions": train.library_versions(),
                "seconds": seconds,
                "peak_memory_gb": peak,
                "measures": measures,
            },
        )


def write_cell(path: Path, cell: dict[str, Any]):
    """Writes a cell's file with numbers of [`DIGITS`] significant digits."""
    write_json(path, _rounded(cell))


def draw_sheet(report: Report, before: Path, after: Path, ground: str, seed: int, output: Path):
    """Draws the first held-out scenes that show a word, and their reconstructions before and after tuning."""
    _be_quiet()
    tokenizers = {
        "before tuning": IBQModel.from_pretrained(before),
        "after tuning": ETTForConditionalGeneration.from_pretrained(after).model.vision_tokenizer,
    }
    scenes = [scene for scene in Scenes(seed, "test", 200, ground) if scene.text and scene.text.kind == "word"]
    scenes = scenes[:SHEET_IMAGES]
    rows = {"original": [scene.render() for scene in scenes]}
    rows |= {name: evaluation_ett.reconstruct(tokenizer, scenes) for name, tokenizer in tokenizers.items()}
    figure = Figure(figsize=(1.25 * len(scenes) + 0.2, 1.25 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    axes = figure.subplots(len(rows), len(scenes), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=9)
    with _stopping_at_a_full_disk(output):
        partial = output.with_name(f".{output.name}.partial.png")
        figure.savefig(partial, dpi=115)
        # Texture compresses badly; 256 colours take a third of the bytes.
        Image.open(partial).convert("RGB").quantize(256).save(partial, optimize=True)
        os.replace(partial, output)


# What is measured, by the kind of cell


def measure_tokenizer(stages: dict[str, Path], ground: str, seed: int, tuned: bool, sizes: dict) -> dict[str, float]:
    """The tokenizer before stage 2."""
    return _tokenizer_measures(IBQModel.from_pretrained(stages["tokenizer"]).to(_device()), ground, seed, sizes)


def measure_understanding(
    stages: dict[str, Path], ground: str, seed: int, tuned: bool, sizes: dict
) -> dict[str, float]:
    """Captions after stage 2, captions and questions after chat, and the tokenizer where it was tuned."""
    scenes = _scenes(ground, seed, sizes)
    semantic, processor = _load(stages["semantic"])
    measures = _caption_measures("semantic", semantic, processor, scenes, seed, sizes)
    if tuned:
        measures |= _tokenizer_measures(semantic.model.vision_tokenizer, ground, seed, sizes)
    return measures | measure_chat(stages, ground, seed, tuned, sizes)


def measure_chat(stages: dict[str, Path], ground: str, seed: int, tuned: bool, sizes: dict) -> dict[str, float]:
    """Captions and questions after chat."""
    scenes = _scenes(ground, seed, sizes)
    chat, processor = _load(stages["chat"])
    asked = evaluation_ett.evaluate_questions(
        chat, processor, scenes, sizes["questions_per_scene"], seed=seed, progress=False
    )
    types = {name: score["accuracy"] for name, score in asked["types"].items()}
    general = [types[name] for name in GENERAL_QUESTIONS if name in types]
    questions = {"mean": asked["mean"], "general": sum(general) / len(general), **types}
    captions = _caption_measures("chat", chat, processor, scenes, seed, sizes)
    return {f"questions.{name}": value for name, value in questions.items()} | captions


def measure_generation(stages: dict[str, Path], ground: str, seed: int, tuned: bool, sizes: dict) -> dict[str, float]:
    """Images that are generated from held-out prompts, judged by the detector."""
    model, processor = _load(stages["generation"])
    prompts = [drawing_pair(seed, "test", index, ground)[0] for index in range(sizes["prompts"])]
    scores = evaluation_ett.evaluate_drawings(
        model,
        processor,
        prompts,
        guidance_scale=sizes["guidance_scale"],
        temperature=sizes["temperature"],
        seed=seed,
        progress=False,
    )
    categories = {name: scores["categories"][name]["accuracy"] for name in PROMPT_CATEGORIES}
    measures = {"mean": scores["mean"], "colours": scores["color_score"], **categories}
    return {f"generation.{name}": value for name, value in measures.items()}


MEASUREMENTS = {
    "tokenizer": measure_tokenizer,
    "understanding": measure_understanding,
    "chat": measure_chat,
    "generation": measure_generation,
}


def _caption_measures(
    stage: str,
    model: ETTForConditionalGeneration,
    processor: ETTProcessor,
    scenes: list[Scene],
    seed: int,
    sizes: dict[str, Any],
) -> dict[str, float | None]:
    scores = evaluation_ett.evaluate_captions(
        model, processor, scenes, seed=seed, examples=sizes["captions"], progress=False
    )
    measures = {"loss": scores["loss"], "true": scores["accuracy"], **scores["attributes"]}
    return {f"captions.{stage}.{name}": value for name, value in measures.items()}


def _tokenizer_measures(tokenizer: IBQModel, ground: str, seed: int, sizes: dict[str, Any]) -> dict[str, float | None]:
    judges = nn.ModuleDict({"rfid": RandomSqueezeFeatures()})
    scores = evaluation_ett.evaluate_reconstruction(
        tokenizer, _scenes(ground, seed, sizes), batch_size=32, progress=False, judges=judges
    )
    scores["frechet"] = scores.pop("rfid")
    names = ("psnr", "ssim", "frechet", "codebook_usage", "perplexity", "shapes_read", "texts_read")
    probes = probe_tokenizer(tokenizer, seed, ground, sizes["probe_train"], sizes["probe_test"])
    return {f"tokenizer.{name}": scores[name] for name in names} | {
        f"probe.{name}": value for name, value in probes.items()
    }


def _scenes(ground: str, seed: int, sizes: dict[str, Any]) -> list[Scene]:
    return list(Scenes(seed, "test", sizes["scenes"], ground))


def _load(folder: Path) -> tuple[ETTForConditionalGeneration, ETTProcessor]:
    model = ETTForConditionalGeneration.from_pretrained(folder).to(_device())
    return model, ETTProcessor.from_pretrained(folder)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class _ReportCallback(TrainerCallback):
    """Reports a trainer's steps."""

    def __init__(self, report: Report):
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps)


@contextmanager
def _stopping_at_a_full_disk(path: Path) -> Iterator[None]:
    """Turns the error of a disk without room, on which no other task could write either, into [`StopTasks`]."""
    try:
        yield
    except CheckpointError as error:
        raise StopTasks(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StopTasks(full_disk_sentence(path, error)) from error


def full_disk_sentence(path: Path, error: OSError) -> str:
    return f"'{path}' could not be written: {error.strerror}. Make room and run the same command again to go on."


def _be_quiet():
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value


__all__ = [
    "GENERAL_QUESTIONS",
    "draw_sheet",
    "extract_tokenizer",
    "full_disk_sentence",
    "measure_cell",
    "train_stage",
    "write_cell",
]
