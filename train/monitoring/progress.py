"""A progress bar that shows the last figures beside the time left, instead of a line for each."""

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = ("loss", "caption_loss", "drawing_loss", "psnr", "codebook_usage")


class FiguresProgressCallback(TrainerCallback):
    """
    Args:
        title (`str`): What is being trained.
    """

    def __init__(self, title: str):
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            desc=self.title,
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not state.is_local_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {name: f"{logs[name]:.3g}" for name in SHOWN if name in logs}
        if figures:
            self.bar.set_postfix(figures, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


__all__ = ["FiguresProgressCallback"]
