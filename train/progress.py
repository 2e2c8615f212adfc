"""A progress bar that shows the last figures beside the time left, instead of a line for each."""

from transformers import ProgressCallback

SHOWN = ("loss", "caption_loss", "drawing_loss", "psnr", "codebook_usage")


class FiguresProgressCallback(ProgressCallback):
    """Args:
    title (`str`): What is being trained.
    """

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)
            self.training_bar.unit = "step"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in SHOWN if name in logs}, refresh=False)


__all__ = ["FiguresProgressCallback"]
