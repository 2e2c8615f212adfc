"""TensorBoard in one folder of the run."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

FOLDER_NAME = "tensorboard"


class BoardCallback(TensorBoardCallback):
    """Writes the curves to `tensorboard/` in the trainer's folder. A resumed run goes on in the same curves: what the
    interrupted one had logged after its last checkpoint no longer counts."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            folder = str(Path(args.output_dir) / FOLDER_NAME)
            self.tb_writer = SummaryWriter(folder, purge_step=state.global_step + 1)
        # Without the model, whose configuration transformers would write in a way that diffusers' lacks.
        super().on_train_begin(args, state, control, **kwargs)


__all__ = ["BoardCallback"]
