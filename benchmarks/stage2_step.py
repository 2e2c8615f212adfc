"""Times each part of a stage-2 step, in which tokenizer, projector and language model learn together.

The trainer is the real one, on the demo's data and on new models of its sizes; its parts are timed in place. Every
repeat is a whole step, so what else the machine does falls on all parts alike. The table shows medians.

    python benchmarks/stage2_step.py --repeats 20
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

import scenes_ett
from modeling_ett.modeling_ibq import IBQModel
from processing_ett import ETTProcessor, build_word_tokenizer
from train import (
    ETTCollator,
    ETTTrainer,
    ETTTrainingArguments,
    InMemoryDataset,
    PreparedDataset,
    SceneExamples,
    library_versions,
    load_recipe,
    train_only,
)
from train.models import join, new_language_model

WARM_UP_STEPS = 3
OPTIMIZER, REST, WHOLE = "optimizer", "the rest", "whole step"


class Clock(TrainerCallback):
    """Seconds of each part in each step. A part inside another one, such as the discriminator's own backward pass,
    counts as the outer one."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self._is_running = False

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, owner: object, method: str, part: str):
        """Replaces the owner's method by one that is timed."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            if self._is_running:
                return function(*args, **kwargs)
            self._is_running, start = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._is_running = False
                self.steps[-1][part] += self.now() - start

        setattr(owner, method, timed)

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(defaultdict(float))
        self._step_start = self.now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._optimizer_start = self.now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps[-1][OPTIMIZER] += self.now() - self._optimizer_start

    def on_step_end(self, args, state, control, **kwargs):
        step = self.steps[-1]
        whole = self.now() - self._step_start
        step[REST] = whole - sum(step.values())
        step[WHOLE] = whole


def build_trainer(batch_size: int | None, repeats: int, output_dir: str) -> ETTTrainer:
    """The demo's stage 2 with new weights, for `repeats` steps after the warm-up."""
    recipe, tokenizer_section = load_recipe("demo_semantic"), load_recipe("demo_tokenizer").model
    training = {
        **recipe.training,
        "max_steps": WARM_UP_STEPS + repeats,
        "discriminator_start_step": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10_000,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if batch_size is not None:
        training["per_device_train_batch_size"] = batch_size
    args = ETTTrainingArguments(output_dir=output_dir, **training)
    torch.manual_seed(0)
    vision_tokenizer = IBQModel(**tokenizer_section.vision_tokenizer)
    processor = ETTProcessor.from_parts(
        build_word_tokenizer(scenes_ett.vocabulary()), vision_tokenizer.spatial_factor, tokenizer_section.image_size
    )
    language_model = new_language_model(load_recipe("demo_language").model.language_model, processor.tokenizer)
    model = join(language_model, vision_tokenizer, processor, tokenizer_section)
    train_only(model, recipe.train)
    examples = SceneExamples("caption", 0, "train", 4 * args.per_device_train_batch_size)
    return ETTTrainer(
        model=model,
        args=args,
        train_dataset=InMemoryDataset(PreparedDataset(examples, "caption", processor)),
        data_collator=ETTCollator(processor.tokenizer.pad_token_id),
    )


def measure(batch_size: int | None, repeats: int) -> dict:
    """Median seconds of each part and its share of the step, with what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = build_trainer(batch_size, repeats, folder), Clock()
        model, vision_tokenizer = trainer.model.model, trainer.model.model.vision_tokenizer
        clock.time(vision_tokenizer, "encode", "tokenizer encode")
        clock.time(vision_tokenizer.quantize, "forward", "quantize")
        for module in (model.projector, model.language_model, trainer.model.lm_head):
            clock.time(module, "forward", "projector + language model")
        clock.time(vision_tokenizer, "decode", "decode")
        clock.time(trainer.perceptual, "forward", "perceptual")
        clock.time(trainer.adversary, "learn", "discriminator step")
        clock.time(trainer.adversary, "fool", "adversarial")
        clock.time(trainer.accelerator, "backward", "backward")
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    steps = clock.steps[WARM_UP_STEPS:]
    seconds = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
    # Medians do not add up exactly; shares are of their sum.
    total = sum(value for part, value in seconds.items() if part != WHOLE)
    return {
        "parts": {
            part: {"seconds": value, "share": 1.0 if part == WHOLE else value / total}
            for part, value in seconds.items()
        },
        "repeats": repeats,
        "batch_size": trainer.args.per_device_train_batch_size,
        "codes_per_picture": (load_recipe("demo_tokenizer").model.image_size // vision_tokenizer.spatial_factor) ** 2,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed steps")
    parser.add_argument("--batch-size", type=int, default=None, help="pictures a step; by default the demo's")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "stage2_step.json", help="JSON file"
    )
    options = parser.parse_args()
    if options.repeats < 1 or (options.batch_size is not None and options.batch_size < 1):
        parser.error("--repeats and --batch-size must be at least 1")
    result = measure(options.batch_size, options.repeats)
    print(
        f"Stage-2 step of the demo: batch of {result['batch_size']}, {result['parameters']:,} parameters, "
        f"{result['device']}, {result['threads']} threads, median of {result['repeats']} steps"
    )
    print(f"{'part':<28}{'seconds':>10}{'share':>9}")
    for part, entry in result["parts"].items():
        print(f"{part:<28}{entry['seconds']:>10.4f}{entry['share']:>9.1%}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
