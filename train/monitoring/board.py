"""TensorBoard in one folder of the run."""

import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

FOLDER_NAME = "tensorboard"
EVENTS = "events.out.tfevents."


class BoardCallback(TensorBoardCallback):
    """Writes the curves to `tensorboard/` in the trainer's folder. A resumed run goes on in the same curves: what the
    interrupted one had logged after its last checkpoint no longer counts."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / FOLDER_NAME
            put_before_now(folder)
            self.tb_writer = SummaryWriter(str(folder), purge_step=state.global_step + 1)
        # Without the model, whose configuration transformers would write in a way that diffusers' lacks.
        super().on_train_begin(args, state, control, **kwargs)


def put_before_now(folder: Path):
    """Gives event files earlier times where a new file would not follow them: TensorBoard reads files in the order of
    their names, which begin with the time, and the clock may have been set back."""
    now = int(time.time())
    for age, path in enumerate(reversed(sorted(folder.glob(f"{EVENTS}*"))), 1):
        seconds, _, rest = path.name.removeprefix(EVENTS).partition(".")
        if int(seconds) > now - age:
            path.rename(folder / f"{EVENTS}{now - age:010}.{rest}")


__all__ = ["BoardCallback", "put_before_now"]
