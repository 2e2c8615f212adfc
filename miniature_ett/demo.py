"""Every stage at miniature scale: trained, measured and shown, on two CPU cores.

The stages are recipes (`train/recipes/demo_*.yaml`). This module runs them in order, the last two side by side, and
hands the models to evaluation, report and cards. The control without tuning is part of the study, not of the demo.
"""

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ett import evaluation_ett, hub_cards, train
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTProcessor
from ett.scenes_ett import PROMPT_CATEGORIES, Scenes, drawing_pair

from .report import write_report
from .study_summary import stored_summary
from .verdicts import has_learned, loss_change

WORK = "ett-work"
SPLITS = ("test", "unseen")
GUIDANCE_SCALE, TEMPERATURE = 2.0, 1.0
"""Sampling of images, which the folder of the generation model keeps; chosen on prompts of other seeds."""
CAPTIONS = 100
GENERATED_EXAMPLES = 8
"""Generated images of each category that the report may show."""


@dataclass(frozen=True)
class Stage:
    """A run of a recipe.

    Args:
        name: Its key in the report.
        recipe: Name of the recipe.
        folder: Where it goes, below the output folder.
        start: Names of stages it starts from, by the recipe's field for each.
        seconds: What it takes on two idle cores, for the time left; not needed of stages `beside`.
        beside: Runs beside the others, in a process of its own: two processes of one thread get half as much again
            out of two cores as one of two threads does with models this small.
        overrides: Further fields of the recipe.
    """

    name: str
    recipe: str
    folder: str
    start: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    overrides: tuple[str, ...] = ()
    beside: bool = False


STAGES = (
    Stage("tokenizer", "demo_tokenizer", "ett-tokenizer", seconds=140),
    Stage("language", "demo_language", f"{WORK}/language", {"model.vision_tokenizer": "tokenizer"}, seconds=30),
    Stage("alignment", "demo_alignment", f"{WORK}/alignment", {"model.path": "language"}, seconds=20),
    Stage("semantic", "demo_semantic", f"{WORK}/semantic", {"model.path": "alignment"}, seconds=330),
    Stage("gen", "demo_gen", "ett-gen", {"model.path": "semantic"}, seconds=520),
    Stage("chat", "demo_chat", "ett-chat", {"model.path": "semantic"}, beside=True),
)
EVALUATION_SECONDS = 90

QUICK = {
    "data.length": 256,
    "training.max_steps": 24,
    "training.warmup_steps": 2,
    "training.logging_steps": 4,
    "training.discriminator_start_step": 12,
}


def run_demo(output_dir: Path, seed: int = 0, quick: bool = False, resume: bool = True) -> Path:
    """Trains, evaluates and reports everything.

    Args:
        output_dir: Receives `ett-tokenizer/`, `ett-chat/`, `ett-gen/`, `report/`; `ett-work/` has what lies between.
        seed: Of data, weights and sampling.
        quick: Every stage with a few steps, to see that all runs; its figures mean nothing.
        resume: Go on where an earlier run in the folder stopped.

    Returns:
        The report's page.

    Raises:
        ValueError: The output folder holds something else.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    start = time.monotonic()
    output_dir = Path(output_dir)
    folders = {stage.name: output_dir / stage.folder for stage in STAGES}
    overrides = {stage.name: stage_overrides(stage, folders, seed, quick) for stage in STAGES}
    check_output(output_dir, folders, overrides, resume)
    run_stages(folders, overrides, resume)
    tqdm.write("Evaluation", file=sys.stderr)
    results = evaluate(folders, seed, quick)
    results["seconds"] = time.monotonic() - start
    results["peak_memory_gb"] = peak_memory_gb()
    page = write_report(results, output_dir / "report", stored_summary())
    write_cards(folders, results)
    if not quick:
        warn_of_stages_without_learning(results["stages"])
    return page


def stage_overrides(stage: Stage, folders: dict[str, Path], seed: int, quick: bool) -> list[str]:
    """What a stage changes in its recipe."""
    overrides = [f"training.seed={seed}", *stage.overrides]
    overrides += [f"{key}={folders[name]}" for key, name in stage.start.items()]
    if quick:
        has_discriminator = stage.name in ("tokenizer", "semantic")
        overrides += [
            f"{key}={value}" for key, value in QUICK.items() if has_discriminator or "discriminator" not in key
        ]
    return overrides


def check_output(output_dir: Path, folders: dict[str, Path], overrides: dict[str, list[str]], resume: bool):
    """Raises `ValueError` where a folder that the demo will write holds something else, before any long work."""
    for stage in STAGES:
        recipe = train.load_recipe(stage.recipe, overrides[stage.name])
        train.check_output_folder(folders[stage.name], recipe, resume)
    report = output_dir / "report"
    if report.exists() and not (report / "results.json").is_file():
        raise ValueError(f"'{report}' holds something else than a report; choose another --output-dir.")


def run_stages(folders: dict[str, Path], overrides: dict[str, list[str]], resume: bool):
    """Trains all stages, those `beside` in a second process as soon as what they start from is there.

    Raises:
        RuntimeError: The second process failed; what it said stands above.
    """
    main = [stage for stage in STAGES if not stage.beside]
    clock = Clock([stage.seconds for stage in main] + [EVALUATION_SECONDS])
    threads = torch.get_num_threads()
    side = multiprocessing.get_context("spawn").Process(
        target=run_side_stages, args=(folders, overrides, resume, max(1, threads // 2)), daemon=True
    )
    first_side_starts = {name for stage in STAGES if stage.beside for name in stage.start.values()}
    try:
        for number, stage in enumerate(main, 1):
            if first_side_starts & set(stage.start.values()) and side.pid is None:
                side.start()
                torch.set_num_threads(max(1, threads // 2))
            clock.begin(number, stage.name)
            train.run_recipe(stage.recipe, overrides[stage.name], folders[stage.name], resume)
        side.join()
    finally:
        torch.set_num_threads(threads)
        if side.is_alive():
            side.terminate()
            side.join()
    if side.exitcode:
        raise RuntimeError("The stages that ran beside the others failed; what they said stands above.")


def run_side_stages(folders: dict[str, Path], overrides: dict[str, list[str]], resume: bool, threads: int):
    """The second process: no bars, which would cross the first one's; a line before and after each stage."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    for stage in STAGES:
        if stage.beside:
            while not all((folders[name] / train.RECORD_NAME).is_file() for name in stage.start.values()):
                time.sleep(1)
            tqdm.write(f"Beside: {stage.name}", file=sys.stderr)
            train.run_recipe(stage.recipe, overrides[stage.name], folders[stage.name], resume, progress=False)
            tqdm.write(f"Beside: {stage.name} done", file=sys.stderr)


class Clock:
    """Says before each part what comes and how long the rest may take, corrected by how long the past took."""

    def __init__(self, planned: list[float]):
        self.planned, self.start = planned, time.monotonic()

    def begin(self, number: int, name: str):
        done, left = sum(self.planned[: number - 1]), sum(self.planned[number - 1 :])
        pace = (time.monotonic() - self.start) / done if done else 1.0
        minutes = pace * left / 60
        tqdm.write(f"[{number}/{len(self.planned)}] {name} · about {minutes:.0f} min left", file=sys.stderr)


def evaluate(folders: dict[str, Path], seed: int, quick: bool) -> dict[str, Any]:
    """Measures the stages' models on held-out scenes; see [`write_report`] for what it returns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = IBQModel.from_pretrained(folders["tokenizer"]).to(device)
    semantic, chat, gen = (
        ETTForConditionalGeneration.from_pretrained(folders[name]).to(device) for name in ("semantic", "chat", "gen")
    )
    gen.keep_image_sampling(guidance_scale=GUIDANCE_SCALE, temperature=TEMPERATURE)
    gen.generation_config.save_pretrained(folders["gen"])
    after = chat.model.vision_tokenizer
    scenes = [Scenes(seed, "test")[index] for index in range(24 if quick else 300)]
    images = [scene.render() for scene in scenes[:8]]
    pairs = zip(
        images, evaluation_ett.reconstruct(before, images), evaluation_ett.reconstruct(after, images), strict=True
    )
    processor = ETTProcessor.from_pretrained(folders["chat"])
    prompts = (2 if quick else 24) * len(PROMPT_CATEGORIES)
    measured = {split: measure_split(split, chat, gen, processor, seed, len(scenes), prompts) for split in SPLITS}
    return {
        "quick": quick,
        "seed": seed,
        "versions": train.library_versions(),
        "settings": {
            "held-out scenes": len(scenes),
            "prompts": prompts,
            "guidance scale": GUIDANCE_SCALE,
            "temperature": TEMPERATURE,
            "threads": torch.get_num_threads(),
            "device": device,
        },
        "stages": [stage_record(stage, folders[stage.name]) for stage in STAGES],
        "reconstruction": {
            "before": evaluation_ett.evaluate_reconstruction(before, scenes),
            "after": evaluation_ett.evaluate_reconstruction(after, scenes),
            "examples": [{"original": o, "before": b, "after": a} for o, b, a in pairs],
        },
        "semantic_captions": evaluation_ett.evaluate_captions(semantic, processor, scenes, seed=seed, examples=0),
        **measured["test"],
        "unseen": measured["unseen"],
    }


def measure_split(
    split: str,
    chat: ETTForConditionalGeneration,
    gen: ETTForConditionalGeneration,
    processor: ETTProcessor,
    seed: int,
    num_scenes: int,
    num_prompts: int,
) -> dict[str, Any]:
    """Answers, captions and generated images for scenes and prompts of one split."""
    scenes = [Scenes(seed, split)[index] for index in range(num_scenes)]
    prompts = [drawing_pair(seed, split, index)[0] for index in range(num_prompts)]
    return {
        "understanding": evaluation_ett.evaluate_questions(chat, processor, scenes, 6, seed=seed),
        "captions": evaluation_ett.evaluate_captions(chat, processor, scenes, seed=seed, examples=CAPTIONS),
        "generation": evaluation_ett.evaluate_drawings(
            gen, processor, prompts, seed=seed, examples_per_category=GENERATED_EXAMPLES
        ),
    }


def stage_record(stage: Stage, folder: Path) -> dict[str, Any]:
    """A stage as the report shows it, from what its training recorded."""
    record = train.read_record(folder)
    trained = {name: part["parameters"] for name, part in record["parts"].items() if part["trained"]}
    return {
        "name": stage.name,
        "title": record["recipe"]["title"],
        "seconds": record["seconds"],
        "steps": record["steps"],
        "parameters": sum(trained.values()),
        "trained": list(trained),
        "history": [entry for entry in record["history"] if "loss" in entry],
    }


def warn_of_stages_without_learning(stages: list[dict[str, Any]]):
    """Prints a sentence for each stage that has not learned (see [`has_learned`])."""
    for stage in stages:
        if not has_learned(stage):
            change = loss_change(stage)
            losses = (
                "it logged no loss" if change is None else f"loss {change.first:.3g}, at the end {change.last:.3g}"
            )
            tqdm.write(f"{stage['title']} has not learned: {losses}.", file=sys.stderr)


def peak_memory_gb() -> float:
    """The largest resident memory of this process and of its largest child, added up."""
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (1024**3 if sys.platform == "darwin" else 1024**2)


def write_cards(folders: dict[str, Path], results: dict[str, Any]):
    """Adds what was measured to the records of the three models that stay, and writes their cards."""

    def result(task: str, metric: str, value: float) -> dict[str, Any]:
        return {"task": task, "dataset": "scenes", "split": "test", "metric": metric, "value": round(value, 4)}

    before, generation = results["reconstruction"]["before"], results["generation"]
    measured = {
        "tokenizer": [
            result("image reconstruction", name, before[key])
            for name, key in (("PSNR", "psnr"), ("SSIM", "ssim"), ("codebook usage", "codebook_usage"))
        ],
        "chat": [
            *(
                result("visual question answering", f"accuracy, {kind}", score["accuracy"])
                for kind, score in results["understanding"]["types"].items()
            ),
            result("image captioning", "loss", results["captions"]["loss"]),
            result("image captioning", "captions wholly true", results["captions"]["accuracy"]),
        ],
        "gen": [
            *(
                result("text-to-image", f"correct, {name}", score["accuracy"])
                for name, score in generation["categories"].items()
            ),
            result("text-to-image", "correct, mean", generation["mean"]),
        ],
    }
    notes = (
        ["A quick run: every stage ran with a few steps, and the figures mean nothing."] if results["quick"] else []
    )
    for name, entries in measured.items():
        record = train.read_record(folders[name]) | {"results": entries, "notes": notes}
        train.write_record(folders[name], record)
        hub_cards.write_card(folders[name], record)


__all__ = ["STAGES", "run_demo"]
