"""A save that is killed, at whatever moment, or that the disk has no room for: the checkpoint before it is whole."""

import os
import random
import resource
import shutil
import signal
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from ett.train import newest_checkpoint
from ett.train.checkpointing.checkpoints import CheckpointError

from .trainers import changed, make_trainer

TOUCHING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
DELETING = {"os.remove", "os.rmdir"}


def in_a_child(function) -> int:
    """Calls it in a forked process. Returns the process's exit status."""
    state = random.getstate()
    process = os.fork()
    if process == 0:
        try:
            # Python seeds a forked process anew.
            random.setstate(state)
            # Threads of the parent are not there, and waited for in vain.
            torch.set_num_threads(1)
            function()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1]


def kill_at(moment, folder):
    """This process is killed when it is about to touch a file in the folder for the `moment`-th time."""
    moments = count()

    def hook(event, arguments):
        if event in TOUCHING and (event in DELETING or str(folder) in str(arguments[0])) and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture
def trainer(make_vision_tokenizer, arguments, make_items, monkeypatch):
    """A tokenizer's trainer of four steps that saves after every other and keeps one checkpoint."""
    # A forked process cannot use CUDA, whose random state is part of a checkpoint.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def make(**changes):
        args = arguments(max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1, **changes)
        return make_trainer(make_vision_tokenizer(), args, make_items(8))

    return make


def contents(checkpoint):
    # The arguments have the run's folder in them, and the list of files their size.
    names = {path.name for path in checkpoint.iterdir()} - {"training_args.bin", "files.json"}
    return {name: (checkpoint / name).read_bytes() for name in names}


def test_wherever_a_save_is_killed_the_run_goes_on_and_ends_as_an_uninterrupted_one(
    trainer, tmp_path, monkeypatch, caplog
):
    whole = trainer()
    save, killed = whole._save_checkpoint, []

    def save_in_a_folder_of_its_own(moment, folder, *args):
        whole.args.output_dir = str(folder)
        kill_at(moment, folder)
        save(*args)

    def save_again_and_again(*args):
        """Each time in a copy of the run's folder, and killed a moment later, up to the end."""
        status = signal.SIGKILL if whole.state.global_step == 4 else 0
        while status == signal.SIGKILL:
            killed.append(shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(killed)}"))
            status = in_a_child(lambda: save_in_a_folder_of_its_own(len(killed) - 1, killed[-1], *args))
        save(*args)

    monkeypatch.setattr(whole, "_save_checkpoint", save_again_and_again)
    whole.train()
    finished = killed.pop()
    assert len(killed) > 30

    expected = {
        "checkpoint-2": contents(killed[0] / "checkpoint-2"),
        "checkpoint-4": contents(finished / "checkpoint-4"),
    }
    newest = [newest_checkpoint(folder) for folder in killed]
    assert all(contents(checkpoint) == expected[checkpoint.name] for checkpoint in newest)
    names = [checkpoint.name for checkpoint in newest]
    assert names == sorted(names) and set(names) == set(expected)
    # What is visible is complete.
    assert not caplog.records

    before_renaming = names.index("checkpoint-4") - 1
    for index in (before_renaming, before_renaming + 1, len(killed) - 1):
        assert (killed[index] / ".unfinished").exists()
        resumed = trainer(output_dir=str(killed[index]))
        resumed.train(resume_from_checkpoint=str(newest[index]))
        assert changed(whole.model.state_dict(), resumed.model) == set()
        assert changed(whole.adversary.discriminator.state_dict(), resumed.adversary.discriminator) == set()
        assert [path.name for path in killed[index].iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("fraction", [0.5, 1.5])
def test_a_full_disk_is_an_error_that_says_what_is_whole(trainer, tmp_path, monkeypatch, fraction):
    full = trainer()
    save = full._save_checkpoint
    report = tmp_path / "report"

    def save_with_little_room(*args):
        size = (tmp_path / "run" / "checkpoint-2" / "diffusion_pytorch_model.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fraction * size), resource.RLIM_INFINITY))
        try:
            save(*args)
        except CheckpointError as error:
            report.write_text(str(error))

    monkeypatch.setattr(
        full,
        "_save_checkpoint",
        lambda *args: save(*args) if full.state.global_step == 2 else in_a_child(lambda: save_with_little_room(*args)),
    )
    full.train()
    message = report.read_text()
    last = "config.json" if fraction < 1 else "optimizer.pt"
    assert message.startswith(f"checkpoint-4 could not be written (the last file begun is {last}): ")
    assert "GiB free. checkpoint-2 is whole; make room and run again to go on." in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_a_disk_with_no_room_for_another_checkpoint_is_a_warning(trainer, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    trainer().train()
    assert "0.00 GiB free, and a checkpoint takes" in caplog.text and "the next one will not fit" in caplog.text
