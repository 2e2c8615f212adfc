"""Signals of schedulers: the step is finished, a checkpoint written, and the same command goes on from there."""

import logging
import multiprocessing
import os
import signal
import subprocess
import tarfile
from contextlib import contextmanager

import pytest
from PIL import Image
from transformers import TrainerCallback

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.train import TrainingInterrupted, newest_checkpoint, run_recipe
from ett.train.trainer import ETTTrainer

from .test_run import TOKENIZER
from .trainers import changed, make_trainer


class Signal(TrainerCallback):
    """Sends a signal to processes while the second step is under way."""

    def __init__(self, number, processes=lambda: [os.getpid()]):
        self.number, self.processes = number, processes

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            # From another process, as a scheduler does.
            subprocess.run(["kill", f"-{int(self.number)}", *map(str, self.processes())], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_at_a_signal_the_step_is_finished_and_saved(make_vision_tokenizer, arguments, make_items, tmp_path, number):
    args = arguments(max_steps=4, gradient_accumulation_steps=2)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items(16), callbacks=[Signal(number)])
    former = signal.getsignal(number)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.interrupted_by == number
    saved = IBQModel.from_pretrained(newest_checkpoint(tmp_path / "run"))
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert changed(saved.state_dict(), trainer.model) == set()
    assert signal.getsignal(number) is former


def test_an_interrupted_run_takes_no_sample_and_has_no_summary(make_vision_tokenizer, arguments, make_items, tmp_path):
    args = arguments(max_steps=4, sample_steps=3)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items(8), callbacks=[Signal(signal.SIGTERM)])
    trainer.train()
    assert not (tmp_path / "run" / "samples").exists()
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2]


def test_a_second_ctrl_c_stops_at_once(make_vision_tokenizer, arguments, make_items, tmp_path, capfd):
    class Twice(Signal):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    args = arguments(max_steps=4, gradient_accumulation_steps=2)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items(16), callbacks=[Twice(signal.SIGINT)])
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and newest_checkpoint(tmp_path / "run") is None
    assert "Press Ctrl-C again to stop at once." in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is former


@pytest.fixture
def interrupted(monkeypatch):
    """Within it, a run receives a signal in its second step."""

    @contextmanager
    def context(number):
        start = ETTTrainer.__init__

        def make(self, *args, **kwargs):
            start(self, *args, **kwargs)
            self.add_callback(Signal(number))

        with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
            patch.setattr(ETTTrainer, "__init__", make)
            yield caught

    return context


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, interrupted, caplog, number):
    overrides = [*TOKENIZER, "training.max_steps=4"]
    whole = run_recipe("demo_tokenizer", overrides, tmp_path / "whole")
    with caplog.at_level(logging.WARNING, logger="ett.train.run"), interrupted(number) as caught:
        run_recipe("demo_tokenizer", overrides, tmp_path / "resumed")
    assert caught.value.code == 128 + number
    assert (
        f"{signal.Signals(number).name}: training stopped after step 2 with a checkpoint. Run the same command again"
        in caplog.text
    )
    assert not (tmp_path / "resumed" / "training.json").exists()

    resumed = run_recipe("demo_tokenizer", overrides, tmp_path / "resumed")
    assert changed(IBQModel.from_pretrained(whole).state_dict(), IBQModel.from_pretrained(resumed)) == set()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_does_not_go_on_with_less_data(tmp_path, interrupted, streaming):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        image = Image.new("RGB", (16, 16), (number, 0, 0))
        image.save(data / f"{number}.png")
        if streaming:
            with tarfile.open(data / f"{number}.tar", "w") as tar:
                tar.add(data / f"{number}.png", f"{number}.png")
            (data / f"{number}.png").unlink()
    overrides = [f"data.source={data}", f"data.streaming={streaming}", "data.in_memory=false"]
    overrides = [*(one for one in TOKENIZER if not one.startswith("data.")), *overrides]
    with interrupted(signal.SIGTERM):
        run_recipe("demo_tokenizer", [*overrides, "training.max_steps=4"], tmp_path / "run")
    min(data.iterdir()).unlink()
    unit = "shards" if streaming else "samples"
    with pytest.raises(ValueError, match=rf"The data have 3 {unit}, and had 4 when the run in '.*run' began; restore"):
        run_recipe("demo_tokenizer", [*overrides, "training.max_steps=4"], tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_hear_the_signal_too_go_on_until_the_step_is_saved(
    make_vision_tokenizer, arguments, make_items, tmp_path, number
):
    everyone = Signal(number, lambda: [child.pid for child in multiprocessing.active_children()] + [os.getpid()])
    args = arguments(max_steps=8, dataloader_num_workers=2, gradient_accumulation_steps=2)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items(32), callbacks=[everyone])
    trainer.train()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_workers_end_with_their_trainer(make_vision_tokenizer, arguments, make_items):
    args = arguments(max_steps=1, dataloader_num_workers=2)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items(16))
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
        worker.join(timeout=20)
    assert [worker.exitcode for worker in workers] == [0, 0]
