"""What a model makes of the same few examples while it learns: reconstructions, answers, drawings."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ett.common_ett.files import replacing
from ett.common_ett.images import to_unit_range
from ett.data_ett import IGNORED
from ett.modeling_ett.modeling_ibq import IBQModel

logger = logging.getLogger(__name__)

FOLDER_NAME = "samples"
NUM_RECONSTRUCTIONS = 8
NUM_ANSWERS = 4
NUM_DRAWINGS = 4
MAX_NEW_TOKENS = 64
LOOKED_AT = 64
"""Examples among which those to show are looked for."""

Item = dict[str, Any]
Shown = tuple[torch.Tensor | None, list[str]]
"""Images as one `(3, rows, columns)` of uint8, and lines of Markdown."""


# What is shown


class Reconstructions:
    """Images above what the tokenizer makes of them."""

    name = "reconstructions"

    def __init__(self, trainer: Trainer):
        self.pixels = first_images(trainer.train_dataset, NUM_RECONSTRUCTIONS)

    def draw(self, trainer: Trainer) -> Shown:
        return draw_sheet(trainer.vision_tokenizer, self.pixels), []


class Answers:
    """Images, and what the model answers to the first request about them, beside what the data have."""

    name = "answers"

    def __init__(self, trainer: Trainer):
        questions = [question_of(item, trainer.model) for item in first_examples(trainer.train_dataset, LOOKED_AT)]
        self.questions = [question for question in questions if question is not None][:NUM_ANSWERS]

    def draw(self, trainer: Trainer) -> Shown:
        model = trainer.model
        lines = ["| request | the model's answer | the data's |", "|---|---|---|"] if self.questions else []
        images = []
        for question in self.questions:
            inputs = {name: value.to(model.device) for name, value in question["inputs"].items()}
            with trainer.accelerator.autocast():
                tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            answer = tokens[0, inputs["input_ids"].shape[1] :].tolist()
            request = [token for token in question["request"] if token != model.config.image_token_id]
            cells = [text_of(ids, trainer) for ids in (request, answer, question["answer"])]
            lines.append(f"| {' | '.join(cells)} |")
            if "image_codes" in inputs:
                images.append(model.decode_image_tokens(inputs["image_codes"]))
            elif "pixel_values" in inputs:
                images.append(inputs["pixel_values"])
        return as_grid(torch.cat(images)) if images else None, lines


class Drawings:
    """What the model draws for the first prompts."""

    name = "drawings"

    def __init__(self, trainer: Trainer):
        start = trainer.model.config.image_start_token_id
        items = first_examples(trainer.train_dataset, LOOKED_AT)
        prompts = [item["input_ids"][: item["input_ids"].index(start) + 1] for item in items]
        # An example whose text was left out, for guidance, asks for nothing.
        empty = [[start], [trainer.model.generation_config.bos_token_id, start]]
        self.prompts = [prompt for prompt in prompts if prompt not in empty][:NUM_DRAWINGS]

    def draw(self, trainer: Trainer) -> Shown:
        if not self.prompts:
            return None, []
        model, device = trainer.model, trainer.model.device
        length = max(map(len, self.prompts))
        padded = [[0] * (length - len(prompt)) + prompt for prompt in self.prompts]
        is_token = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        with trainer.accelerator.autocast():
            codes = model.generate(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(is_token, device=device),
                generation_mode="image",
                generator=[torch.Generator(device).manual_seed(trainer.args.seed) for _ in self.prompts],
            )
        lines = [f"{number}. {text_of(prompt, trainer)}" for number, prompt in enumerate(self.prompts, 1)]
        return as_grid(model.decode_image_tokens(codes)), lines


def question_of(item: Item, model: torch.nn.Module) -> dict[str, Any] | None:
    """The first request in a prepared example, as `generate` takes it (`inputs`), its tokens (`request`) and those of
    its answer (`answer`); none where nothing stands before what is predicted."""
    is_predicted = [label != IGNORED for label in item["labels"]]
    if True not in is_predicted[1:] or is_predicted[0]:
        return None
    begin = is_predicted.index(True)
    answer = list(itertools.takewhile(lambda label: label != IGNORED, item["labels"][begin:]))
    request = item["input_ids"][:begin]
    inputs = {"input_ids": torch.tensor([request]), "attention_mask": torch.ones(1, begin, dtype=torch.long)}
    placeholders = request.count(model.config.image_token_id)
    if placeholders and "image_codes" in item:
        codes = item["image_codes"]
        inputs["image_codes"] = codes[: placeholders // codes[0].numel()]
    elif placeholders:
        pixels = item["pixel_values"]
        factor = model.model.vision_tokenizer.spatial_factor
        inputs["pixel_values"] = to_unit_range(pixels[: placeholders * factor**2 // pixels[0, 0].numel()])
    return {"inputs": inputs, "request": request, "answer": answer}


def text_of(tokens: list[int], trainer: Trainer) -> str:
    """Tokens as text that fits into a table; as numbers where the trainer has no processor."""
    text = " ".join(map(str, tokens))
    if trainer.processing_class is not None:
        text = trainer.processing_class.tokenizer.decode(tokens, skip_special_tokens=True)
    return " ".join(text.split()).replace("|", "\\|")


def first_examples(dataset: Dataset, number: int) -> list[Item]:
    """The first prepared examples, up to `number`."""
    return list(itertools.islice(_items(dataset), number))


def _items(dataset: Dataset) -> Iterable[Item]:
    return dataset if isinstance(dataset, IterableDataset) else (dataset[index] for index in range(len(dataset)))


def first_images(dataset: Dataset, number: int) -> torch.Tensor:
    """The first images of prepared examples, up to `number`, as pixels `(n, 3, H, W)` in `[-1, 1]`.

    Raises:
        ValueError: The examples have no images.
    """
    images: list[torch.Tensor] = []
    for item in _items(dataset):
        images += item.get("pixel_values", ())
        if len(images) >= number:
            break
    if not images:
        raise ValueError("Reconstructions need images, and the training data have none; set training.sample_steps=0.")
    return to_unit_range(torch.stack(images[:number]))


@torch.no_grad()
def draw_sheet(tokenizer: IBQModel, pixels: torch.Tensor) -> torch.Tensor:
    """Images `(n, 3, H, W)` in `[-1, 1]` above their reconstructions, one image `(3, rows, columns)` of uint8."""
    was_training = tokenizer.training
    tokenizer.eval()
    # One by one: all of them may not fit beside the state of training.
    reconstructions = [tokenizer.decode_codes(tokenizer.encode_codes(image)).sample for image in pixels.split(1)]
    tokenizer.train(was_training)
    return as_grid(torch.cat([pixels, torch.cat(reconstructions).float().cpu()]), len(pixels))


def as_grid(pixels: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Images `(n, 3, H, W)` in `[-1, 1]` in rows of `columns`, by default in one, as one `(3, rows, columns)` of
    uint8."""
    shown = (pixels.float().cpu().clamp(-1, 1) + 1) / 2
    grid = make_grid(shown, nrow=columns or len(pixels), pad_value=1.0)
    return (grid * 255).round().to(torch.uint8)


# When it is shown


def sampler_types(trainer: Trainer) -> list[type]:
    """What there is to show of a stage: reconstructions where a tokenizer learns, and what the language model says or
    draws."""
    kinds: list[type] = [Reconstructions] if trainer.tunes_tokenizer else []
    if trainer.is_tokenizer:
        return kinds
    return [*kinds, Drawings if trainer.data_collator.predicts_codes else Answers]


class SamplesCallback(TrainerCallback):
    """Every `sample_steps` steps and at the end of training, but not at a signal, writes `samples/answers-000500.md`
    and the like, with their images, in the trainer's folder, and shows them in TensorBoard where the run reports
    there. Samples are of the averaged weights where there are such. Training goes on as if nothing had been sampled.

    Args:
        trainer ([`ETTTrainer`])
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.samplers = []
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            logger.warning("No samples are drawn: the model is sharded over processes (training.sample_steps).")
        elif state.is_world_process_zero:
            self.samplers = [kind(self.trainer) for kind in sampler_types(self.trainer)]

    def on_step_end(self, args, state, control, **kwargs):
        is_end = control.should_training_stop and not self.trainer.interrupted_by
        is_due = state.global_step % args.sample_steps == 0 or is_end
        if not (is_due and self.samplers):
            return
        folder = Path(args.output_dir) / FOLDER_NAME
        folder.mkdir(parents=True, exist_ok=True)
        for sampler in self.samplers:
            with self.trainer.throughput.paused(), undisturbed(self.trainer):
                sheet, lines = sampler.draw(self.trainer)
            self._show(folder / f"{sampler.name}-{state.global_step:06d}", sheet, lines)
            for board in self.trainer.callback_handler.callbacks:
                if isinstance(board, TensorBoardCallback):
                    if sheet is not None:
                        board.tb_writer.add_image(sampler.name, sheet, state.global_step)
                    if lines:
                        board.tb_writer.add_text(sampler.name, "\n".join(lines), state.global_step)

    @staticmethod
    def _show(path: Path, sheet: torch.Tensor | None, lines: list[str]):
        if sheet is not None:
            with replacing(path.with_suffix(".png")) as temporary:
                to_pil_image(sheet).save(temporary, format="PNG")
            lines = lines and [f"![]({path.name}.png)", "", *lines]
        if lines:
            with replacing(path.with_suffix(".md")) as temporary:
                temporary.write_text("\n".join(lines) + "\n")


@contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Within it, the model has its averaged weights and the mode of inference; afterwards all is as before, the
    generators of random numbers included."""
    model, was_training = trainer.model, trainer.model.training
    device = trainer.args.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.no_grad(),
        trainer.averaged_weights(),
    ):
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


__all__ = ["SamplesCallback", "as_grid", "draw_sheet", "first_examples", "first_images", "question_of"]
