"""Ctrl-C, and signals by which schedulers take a machine away: the step is finished, a checkpoint written, and the run
ends. A second Ctrl-C ends the run at once.

Transformers' own `enable_jit_checkpoint` writes in the middle of a step, each process when its own timer ends, and
leaves with success.
"""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

from torch.utils.data import DataLoader

# The end, Slurm's customary warning before it, and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

FIRST_CTRL_C = b"\nCtrl-C: training stops with a checkpoint after this step. Press Ctrl-C again to stop at once.\n"


class TrainingInterrupted(SystemExit):
    """Training ended early, at a signal, with a checkpoint. Uncaught, it ends the process with 128 plus the signal's
    number, as shells and schedulers expect: 143 after SIGTERM, 138 after SIGUSR1, 130 after
    Ctrl-C."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.name, self.step = signal.Signals(number).name, step

    def __str__(self) -> str:
        return (
            f"{self.name}: training stopped after step {self.step} with a checkpoint. "
            "Run the same command again to go on."
        )


class Interruption:
    """Within it, [`SIGNALS`] do not end the process; `received` is the number of the last, or 0. A second SIGINT
    raises `KeyboardInterrupt`. Only a process's main thread hears them."""

    def __init__(self):
        self.received = 0
        self._interrupts = 0

    def _receive(self, number: int, frame: FrameType | None):
        self.received = number
        if number != signal.SIGINT:
            return
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":
            # A handler may run inside of a print, which cannot be entered twice.
            os.write(2, FIRST_CTRL_C)

    def __enter__(self) -> "Interruption":
        self.received = self._interrupts = 0
        self._former = {}
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self._former.items():
            signal.signal(number, handler)


def shield_workers(loader: DataLoader):
    """Schedulers and terminals signal every process of a run. The workers of a loader go on until their trainer ends
    them, since it needs their batches for the step it is to finish."""
    # Accelerate's loader, or a stream's, stands before the one that has the workers.
    loader = getattr(loader, "base_dataloader", None) or getattr(loader, "loader", loader)
    if loader.num_workers:
        loader.worker_init_fn = partial(_shielded, loader.worker_init_fn)


def _shielded(initialize: Callable[[int], None] | None, worker: int):
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initialize is not None:
        initialize(worker)


def _end_with_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


__all__ = ["Interruption", "TrainingInterrupted", "shield_workers"]
