"""What a step of training costs beyond what it cannot do without.

- Stages 1 and 3 from codes, against the language-model part alone: forward and backward pass from input embeddings to
  the loss, and the optimizer's step with its clipping.
- Stage 2, against the sum of its parts timed alone: encoder, quantizer, decoder, LPIPS, discriminator, language model
  with projector, optimizer.
- Stages 1 and 3 from images, against the same from codes: reading JPEGs and encoding with a tokenizer of the paper's
  size.

Every repeat times a whole step of the real trainer and, right after it, its parts, so what else the machine does falls
on both alike. Medians and ratios of one run.

    python benchmarks/training.py --repeats 10
"""

import argparse
import functools
import io
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTImageProcessor
from ett.processing_ett.image_reading_ett import load_image
from ett.train import ETTCollator, ETTTrainer, ETTTrainingArguments, library_versions, load_recipe, train_only

WARM_UP_STEPS = 2
VOCABULARY, IMAGE, IMAGE_START, IMAGE_END = 8192, 1, 2, 3
SIDE, WORDS = 128, 60
STAGES = ("stage1_alignment", "stage3_chat", "stage3_gen")
WHOLE, OPTIMIZER, LANGUAGE = "whole step", "optimizer", "language model"


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Seconds of whole steps, of the optimizer in them, and of each part alone right after them.

    Args:
        parts: Part to what runs it, forward and backward; gradients that it leaves are thrown away.
        model: Whose gradients these are.
    """

    def __init__(self, parts: dict[str, Callable[[], Any]], model: torch.nn.Module):
        self.parts, self.model = parts, model
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_start = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_seconds = self.clipping_seconds + now() - self.optimizer_start

    def time_clipping(self, trainer: ETTTrainer):
        """Clipping comes before the first event of the optimizer."""
        clip = trainer._clip_grad_norm

        def timed(*args, **kwargs):
            start = now()
            norm = clip(*args, **kwargs)
            self.clipping_seconds = now() - start
            return norm

        trainer._clip_grad_norm = timed

    def on_step_end(self, args, state, control, **kwargs):
        step = {WHOLE: now() - self.start}
        for name, part in self.parts.items():
            start = now()
            part()
            step[name] = now() - start
            self.model.zero_grad()
        step[OPTIMIZER] = self.optimizer_seconds
        self.steps.append(step)

    def medians(self) -> dict[str, float]:
        """Median seconds of each part, after the warm-up."""
        steps = self.steps[WARM_UP_STEPS:]
        return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def build_model() -> ETTForConditionalGeneration:
    """A language model of 25M parameters beside its embeddings, and a tokenizer of 64 codes an image."""
    torch.manual_seed(0)
    language_model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    vision_tokenizer = IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(32, 32, 64, 64, 128),
        layers_per_block=1,
        latent_channels=128,
        num_vq_embeddings=VOCABULARY,
        vq_embed_dim=128,
    )
    return ETTForConditionalGeneration.from_parts(
        language_model,
        vision_tokenizer,
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        image_size=SIDE,
        visual_head=True,
    )


def make_items(count: int, num_codes: int, predicts_codes: bool, has_codes: bool) -> list[dict[str, Any]]:
    """Prepared examples of an image and `WORDS` words, in the order of the stage."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(count):
        words = torch.randint(4, VOCABULARY, (WORDS,), generator=generator).tolist()
        image = [IMAGE_START, *[IMAGE] * num_codes, IMAGE_END]
        ignored = [-100] * len(image)
        item = {"input_ids": words + image if predicts_codes else image + words}
        item["labels"] = [-100] * len(words) + ignored if predicts_codes else ignored + words
        if has_codes:
            side = int(num_codes**0.5)
            item["image_codes"] = torch.randint(0, VOCABULARY, (1, side, side), generator=generator)
        else:
            item["pixel_values"] = torch.randint(0, 256, (1, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        items.append(item)
    return items


def build_trainer(recipe_name: str, batch_size: int, repeats: int, folder: str, has_codes: bool) -> ETTTrainer:
    """A stage at the paper's settings, on new models and made-up examples."""
    recipe = load_recipe(recipe_name)
    model = build_model()
    train_only(model, recipe.train)
    predicts_codes = recipe.task == "drawing"
    num_codes = (SIDE // model.model.vision_tokenizer.spatial_factor) ** 2
    training = {
        name: value
        for name, value in recipe.training.items()
        if name not in ("global_batch_size", "num_train_epochs", "sample_steps", "gradient_checkpointing")
    }
    training |= {
        "max_steps": WARM_UP_STEPS + repeats,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "perceptual_pretrained": False,
        "bf16": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    trainer = ETTTrainer(
        model=model,
        args=ETTTrainingArguments(output_dir=folder, **training),
        train_dataset=make_items(4 * batch_size, num_codes, predicts_codes, has_codes),
        data_collator=ETTCollator(predicts_codes=predicts_codes),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def language_part(trainer: ETTTrainer, with_projector: bool) -> Callable[[], Any]:
    """The language model alone, from a batch's embeddings to the loss and back; behind the projector, or not."""
    model = trainer.model
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(batch["input_ids"])
    placeholders = batch["input_ids"] == IMAGE
    codes = torch.zeros(1, 1, int(placeholders.sum()), dtype=torch.long, device=embeddings.device)
    with torch.no_grad():
        images = model.model.vision_tokenizer.codes_to_embeddings(codes)[0, :, 0].T.contiguous()

    def run():
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            inputs = embeddings.detach().requires_grad_()
            if with_projector:
                places = torch.arange(len(images), device=images.device)
                projected = model.model.projector(images.detach().requires_grad_(), places, len(places))
                inputs = inputs.masked_scatter(placeholders[..., None], projected.to(inputs.dtype))
            hidden = model.model.language_model(
                inputs_embeds=inputs, attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
            if "labels" in batch:
                loss = model.lm_head(hidden[:, :-1], batch["labels"][:, 1:])
            else:
                before = hidden[:, :-1][placeholders[:, 1:]]
                loss = model.visual_head(before, batch["image_codes"].flatten())
        loss.backward()

    return run


def stage_2_parts(trainer: ETTTrainer) -> dict[str, Callable[[], Any]]:
    """Each part of stage 2 by itself, forward and backward, on a batch of its own."""
    tokenizer, adversary = trainer.vision_tokenizer, trainer.adversary
    pixels = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))["pixel_values"]
    with torch.no_grad():
        latents = tokenizer.encode(pixels).latents
        embeddings = tokenizer.quantize(latents).embeddings
        reconstruction = tokenizer.decode(embeddings, force_not_quantize=True).sample

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_()

    def encoder():
        tokenizer.encode(pixels).latents.backward(latents)

    def quantizer():
        quantized = tokenizer.quantize(leaf(latents), return_losses=True)
        (quantized.quantization_loss + quantized.entropy_loss + (quantized.embeddings * embeddings).sum()).backward()

    def decoder():
        tokenizer.decode(leaf(embeddings), force_not_quantize=True).sample.backward(reconstruction)

    def perceptual():
        trainer.perceptual(pixels, leaf(reconstruction)).mean().backward()

    def discriminator():
        adversary.fool(leaf(reconstruction)).backward()
        adversary.learn(pixels, reconstruction, 1.0)
        adversary.step()

    return {
        "encoder": autocast(trainer, encoder),
        "quantizer": autocast(trainer, quantizer),
        "decoder": autocast(trainer, decoder),
        "LPIPS": perceptual,
        "discriminator": discriminator,
        LANGUAGE: language_part(trainer, with_projector=True),
    }


def autocast(trainer: ETTTrainer, part: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(part)
    def run():
        with trainer.accelerator.autocast():
            part()

    return run


def measure(recipe_name: str, batch_size: int, repeats: int) -> dict[str, float]:
    """Median seconds of a stage's whole step, and of what it is made of alone."""
    is_joint = recipe_name == "stage2_semantic"
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe_name, batch_size, repeats, folder, has_codes=not is_joint)
        if is_joint:
            trainer.adversary.prepare(WARM_UP_STEPS + repeats, None)
            parts = stage_2_parts(trainer)
        else:
            parts = {LANGUAGE: language_part(trainer, with_projector=False)}
        clock = Clock(parts, trainer.model)
        trainer.add_callback(clock)
        clock.time_clipping(trainer)
        trainer.train()
    return clock.medians()


def image_costs(repeats: int) -> dict[str, float]:
    """Median seconds for one image that codes save: reading a JPEG of 640 x 480 at 256 x 256, and encoding it with a
    tokenizer of the paper's size."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    image_processor = ETTImageProcessor(size={"height": 256, "width": 256})
    torch.manual_seed(0)
    tokenizer = IBQModel().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    seconds = defaultdict(list)
    for _ in range(1 + repeats):
        start = now()
        pixels = image_processor(load_image(buffer.getvalue()), return_tensors="pt")["pixel_values"]
        read = now()
        with torch.no_grad():
            tokenizer.encode_codes(pixels.to(tokenizer.device))
        seconds["reading a JPEG"].append(read - start)
        seconds["encoding"].append(now() - read)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def describe(name: str, seconds: dict[str, float]) -> tuple[str, float]:
    """A line of the table, and how many times the whole step is its parts' sum."""
    parts = {part: value for part, value in seconds.items() if part != WHOLE}
    ratio = seconds[WHOLE] / sum(parts.values())
    listed = ", ".join(f"{part} {value:.3f}" for part, value in parts.items())
    return f"{name:<18}{seconds[WHOLE]:>9.3f}{sum(parts.values()):>9.3f}{ratio - 1:>+9.1%}   {listed}", ratio


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed steps")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "training.json", help="JSON file"
    )
    options = parser.parse_args()
    if options.repeats < 1 or options.batch_size < 1:
        parser.error("--repeats and --batch-size must be at least 1")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    print(f"Steps of {options.batch_size} images on {device}, medians of {options.repeats}, in seconds")
    print(f"{'stage':<18}{'step':>9}{'parts':>9}{'beyond':>9}   each part alone")
    results: dict[str, Any] = {"stages": {}, "ratios": {}}
    for name in (*STAGES, "stage2_semantic"):
        seconds = measure(name, options.batch_size, options.repeats)
        line, results["ratios"][name] = describe(name, seconds)
        results["stages"][name] = seconds
        print(line, flush=True)
    results["image"] = costs = image_costs(options.repeats)
    print("What codes save for each image of 256 x 256, tokenizer of the paper's size:")
    for name, value in costs.items():
        print(f"{name:<18}{value:>9.3f}")
    results |= {
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "device": device,
        "versions": library_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
