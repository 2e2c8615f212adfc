"""Contact sheets: the same pictures and their reconstructions while a tokenizer learns."""

import os
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from modeling_ett.modeling_ibq import IBQModel

from .data import to_unit_range

FOLDER_NAME = "sheets"
NUM_PICTURES = 8


def first_pictures(dataset: Dataset, number: int) -> torch.Tensor:
    """The first pictures of prepared examples, up to `number`, as pixels `(n, 3, H, W)` in `[-1, 1]`.

    Raises:
        ValueError: The examples have no pictures.
    """
    pictures: list[torch.Tensor] = []
    for index in range(len(dataset)):
        pictures += dataset[index].get("pixel_values", ())
        if len(pictures) >= number:
            break
    if not pictures:
        raise ValueError(
            "A contact sheet needs pictures, and the training data have none; set training.sheet_steps=0."
        )
    return to_unit_range(torch.stack(pictures[:number]))


@torch.no_grad()
def draw_sheet(tokenizer: IBQModel, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures `(n, 3, H, W)` in `[-1, 1]` above their reconstructions, one picture `(3, rows, columns)` of uint8."""
    was_training = tokenizer.training
    tokenizer.eval()
    # One by one: all of them may not fit beside the state of training.
    reconstructions = [tokenizer.decode_codes(tokenizer.encode_codes(picture)).sample for picture in pixels.split(1)]
    tokenizer.train(was_training)
    rows = torch.cat([pixels, torch.cat(reconstructions).float().cpu()]).clamp(-1, 1)
    grid = make_grid((rows + 1) / 2, nrow=len(pixels), pad_value=1.0)
    return (grid * 255).round().to(torch.uint8)


class ContactSheetCallback(TrainerCallback):
    """Every `sheet_steps` steps and at the end, writes `sheets/step-000500.png` in the trainer's folder, and shows it
    in TensorBoard where the run reports there. Reconstructions are of the averaged weights where there are such.

    Args:
        trainer ([`ETTTrainer`]): With a tokenizer that learns.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.pixels = first_pictures(self.trainer.train_dataset, NUM_PICTURES)

    def on_step_end(self, args, state, control, **kwargs):
        is_due = state.global_step % args.sheet_steps == 0 or control.should_training_stop
        if not (is_due and state.is_world_process_zero):
            return
        with self.trainer.averaged_weights():
            sheet = draw_sheet(self.trainer.vision_tokenizer, self.pixels)
        folder = Path(args.output_dir) / FOLDER_NAME
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{state.global_step:06d}.png"
        temporary = path.with_name(f".{path.name}.tmp")
        to_pil_image(sheet).save(temporary, format="PNG")
        os.replace(temporary, path)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_image("reconstructions", sheet, state.global_step)


__all__ = ["ContactSheetCallback", "draw_sheet", "first_pictures"]
