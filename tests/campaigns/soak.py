"""Training that is disturbed at random moments, and then equals training that was not, bit for bit.

    python -m tests.campaigns.soak --kills 100 --seed 0

- Every stage is trained once without a disturbance, by a process of its own.
- Then it is trained again and again: each run is disturbed one to three times and started anew by the same `ett train`
  command until it ends.
- Weights, optimizers, random states, the training record and TensorBoard's curves of both are compared.

Runs are forks of a process that has imported everything, so that a start takes a second. Linux only.
"""

import argparse
import collections
import ctypes
import dataclasses
import io
import itertools
import json
import logging
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Read by the libraries when they are first imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}

import datasets
import numpy as np
import peft  # noqa: F401 - so that no run has to import it
import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tqdm.auto import tqdm

from ett import hub_cards  # noqa: F401 - as above
from ett.cli import main
from ett.data_ett import SceneExamples
from ett.train import ETTTrainer, newest_checkpoint, read_record

from ..train.trainers import timeless

PHASES = ("start-up", "steps", "checkpoint", "end")
START, STEPS, CHECKPOINT, END = range(len(PHASES))
MOST_MARKS = 128
LIMIT = 180
"""Seconds after which a run is taken to hang."""
MOST_STARTS = 12
ROWS = 12

AT_FILE, FULL_DISK, MISSING_DATA, CLOCK = "at a file", "full disk", "missing data", "clock"
KINDS = ("SIGKILL", AT_FILE, "SIGTERM", "SIGINT", FULL_DISK, MISSING_DATA, CLOCK)
STATUSES = {
    "SIGKILL": {-signal.SIGKILL},
    AT_FILE: {-signal.SIGKILL},
    "SIGTERM": {-signal.SIGTERM, 128 + signal.SIGTERM},
    "SIGINT": {128 + signal.SIGINT},
    FULL_DISK: {1},
    MISSING_DATA: {1},
    CLOCK: {-signal.SIGKILL},
}
"""How a run may end at a disturbance. Status 0 is always possible, since a disturbance may come too late."""

DAY = 86_400.0
MOST_BYTES = 100_000
"""More than the largest file that a run writes has."""

OPENING, DELETING = {"open", "os.mkdir", "os.rename"}, {"os.remove", "os.rmdir"}
"""Audit events of files. What is deleted is named relative to its folder."""


# Data and stages


def make_data(folder: Path):
    """A few scenes as a folder of images with captions beside them, a table of conversations with their images, texts,
    and two tar files."""
    captioned = SceneExamples("caption", 0, "train", ROWS)
    asked = SceneExamples("chat", 0, "train", ROWS, questions_per_scene=3, independent_turns=True)
    images, chats, shards = folders = [folder / name for name in ("images", "chats", "shards")]
    for made in folders:
        made.mkdir(parents=True)
    conversations, texts = [], []
    for number in range(ROWS):
        example, chat, name = captioned[number], asked[number], f"{number:02}.png"
        for images_folder in (images, chats):
            example["images"][0].save(images_folder / name)
        (images / name).with_suffix(".txt").write_text(example["text"])
        turns = [_turn(message) for message in chat["messages"]]
        conversations.append({"image": name, "messages": turns})
        texts += [{"text": text} for text in (example["text"], *(turn["content"] for turn in turns))]
        with tarfile.open(shards / f"{number % 2}.tar", "a") as tar:
            for suffix, content in (("png", (images / name).read_bytes()), ("txt", example["text"].encode())):
                member = tarfile.TarInfo(f"{number:02}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for path, rows in (
        (chats / "chat.jsonl", conversations),
        (folder / "text.jsonl", [{"text": row["text"].removeprefix("<image>")} for row in texts]),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _turn(message: dict[str, Any]) -> dict[str, str]:
    content = message["content"]
    if not isinstance(content, str):
        content = "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
    return {"role": message["role"], "content": content}


@dataclasses.dataclass
class Stage:
    """A stage of training.

    Args:
        start: The stage whose finished model it starts from.
        data: What may go missing of the data at any time: its name in the folder of data.
        parts: What may go missing once the data are open, as a pattern.
        overrides: Further fields of the recipe.
    """

    recipe: str
    start: str | None
    data: str
    parts: str
    overrides: tuple[str, ...]


COMMON = (
    *("training.max_steps=14", "training.logging_steps=3", "training.save_steps=5", "training.sample_steps=7"),
    *("training.per_device_train_batch_size=2", "training.use_cpu=true", "training.bf16=false"),
    *("training.dataloader_pin_memory=false", "training.lr_scheduler_type=cosine", "training.warmup_steps=2"),
)
CRITICS = (
    *("training.discriminator_width=8", "training.discriminator_layers=1", "training.critics_batch_size=1"),
    "training.discriminator_start_step=0",
)
STAGES = {
    "tokenizer": Stage(
        "demo_tokenizer",
        None,
        "images",
        "images/*.png",
        (
            "data.source={data}/images",
            "model.image_size=16",
            "model.vision_tokenizer={down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D], "
            "up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D], block_out_channels: [16, 16], "
            "layers_per_block: 1, latent_channels: 8, num_vq_embeddings: 32, vq_embed_dim: 8, norm_num_groups: 4, "
            "patch_size: 2}",
            "training.ema_decay=0.9",
            "training.dataloader_num_workers=1",
            "training.perceptual_weight=0",
            *CRITICS,
            "training.discriminator_start_step=4",
        ),
    ),
    "language": Stage(
        "demo_language",
        "tokenizer",
        "text.jsonl",
        "text.jsonl",
        (
            "data.source={data}/text.jsonl",
            "model.image_size=16",
            "model.vision_tokenizer={start}",
            "model.language_model={model_type: qwen2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
            "num_key_value_heads: 2, intermediate_size: 64, tie_word_embeddings: true, initializer_range: 0.06}",
        ),
    ),
    "alignment": Stage(
        "stage1_alignment",
        "language",
        "images",
        "images/*.png",
        ("data.source={data}/images", "model.path={start}", "training.global_batch_size=4"),
    ),
    "semantic": Stage(
        "demo_semantic",
        "alignment",
        "images",
        "images/*.png",
        (
            "data.source={data}/images",
            "data.filters=[{type: resolution, min_side: 8}]",
            "model.path={start}",
            "training.gradient_accumulation_steps=2",
            "training.ema_decay=0.9",
            "training.perceptual_weight=0",
            *CRITICS,
        ),
    ),
    "chat": Stage(
        "demo_chat",
        "semantic",
        "chats",
        "chats/chat.jsonl",
        ("data.source={data}/chats/chat.jsonl", "data.in_memory=false", "model.path={start}"),
    ),
    "generation": Stage(
        "demo_gen",
        "semantic",
        "shards",
        "shards/*.tar",
        (
            "data.source={data}/shards",
            "data.in_memory=false",
            "data.streaming=true",
            "data.shuffle_rows=4",
            "model.path={start}",
            "training.dataloader_num_workers=1",
        ),
    ),
    "lora": Stage(
        "lora_chat",
        "semantic",
        "chats",
        "chats/chat.jsonl",
        (
            "data.source={data}/chats/chat.jsonl",
            "model.path={start}",
            "lora.rank=4",
            "lora.dropout=0.1",
            "training.global_batch_size=4",
            "training.ema_decay=0.9",
        ),
    ),
}


def command(name: str, root: Path, output: Path) -> list[str]:
    """Arguments of `ett` that train a stage."""
    stage = STAGES[name]
    places = {"{data}": str(root / "data"), "{start}": str(root / "whole" / str(stage.start))}
    overrides = []
    for override in (*COMMON, *stage.overrides):
        for place, path in places.items():
            override = override.replace(place, path)
        overrides.append(override)
    return ["train", stage.recipe, *overrides, "--output-dir", str(output)]


# A run


class Board(ctypes.Structure):
    """Memory that a run and its observer share: the run writes its phase and how often it has touched a file of its
    folder, the observer how wrong the clock is and at which touch the run is killed."""

    _fields_ = [
        ("clock", ctypes.c_double),
        ("touches", ctypes.c_int),
        ("last_touch", ctypes.c_int),
        ("phase", ctypes.c_int),
        ("begun", ctypes.c_int * len(PHASES)),
        ("marks", ctypes.c_int),
        ("phases", ctypes.c_int * MOST_MARKS),
        ("times", ctypes.c_double * MOST_MARKS),
    ]

    def enter(self, phase: int):
        """Notes that a phase begins."""
        if self.marks < MOST_MARKS:
            self.phases[self.marks], self.times[self.marks] = phase, time.monotonic()
            self.marks += 1
        self.phase = phase
        self.begun[phase] += 1

    def segments(self) -> list[tuple[int, int, float]]:
        """Phase, its number among those of the same phase, and seconds of all that is over."""
        numbers = collections.Counter()
        found = []
        for mark in range(self.marks - 1):
            phase = self.phases[mark]
            numbers[phase] += 1
            found.append((phase, numbers[phase], self.times[mark + 1] - self.times[mark]))
        return found


class Run:
    """A forked process that trains.

    Args:
        arguments: Of `ett`.
        log: File for what it prints.
        cache: Folder for what datasets keeps.
        last_touch: Number of the touch of a file at which it is killed, or 0.
    """

    def __init__(self, arguments: list[str], log: Path, cache: Path, last_touch: int = 0):
        self.board = Board.from_buffer(mmap.mmap(-1, ctypes.sizeof(Board)))
        self.board.last_touch = last_touch
        self.log, self.status = log, None
        self._latest = time.monotonic() + LIMIT
        sys.stdout.flush()
        self._printed, output = os.pipe()
        os.set_blocking(self._printed, False)
        self.pid = os.fork()
        if self.pid == 0:
            # A file would be full when the disk is.
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = 1
            try:
                status = _train(arguments, cache, self.board)
            finally:
                os._exit(status)
        os.close(output)

    def is_running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._read()
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                os.close(self._printed)
            elif time.monotonic() > self._latest:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                os.close(self._printed)
                self.status = -signal.SIGKILL
                raise TimeoutError(f"The run hangs in the phase {PHASES[self.board.phase]}; see {self.log}.")
        return self.status is None

    def _read(self):
        with self.log.open("ab") as log, suppress(BlockingIOError):
            while printed := os.read(self._printed, 2**16):
                log.write(printed)

    def wait(self) -> int:
        """Its exit status; the signal's number below 0."""
        while self.is_running():
            time.sleep(0.002)
        return self.status

    def wait_for(self, phase: int, number: int, seconds: float) -> bool:
        """Waits until some seconds after it has begun a phase for the `number`-th time. Returns whether it still
        runs."""
        while self.is_running() and self.board.begun[phase] < number:
            time.sleep(0.001)
        time.sleep(seconds if self.is_running() else 0)
        return self.is_running()


def _train(arguments: list[str], cache: Path, board: Board) -> int:
    """What a run's process does. Returns its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    board.enter(START)
    try:
        datasets.config.HF_DATASETS_CACHE = cache
        clock = time.time
        time.time = lambda: clock() + board.clock
        _mark_phases(board)
        _count_touches(board, arguments[-1])
        sys.argv = ["ett", *arguments]
        main()
    except SystemExit as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        board.enter(END)
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _mark_phases(board: Board):
    def around(name: str, before: int | None, after: int | None):
        method = getattr(ETTTrainer, name)

        def marked(self, *args, **kwargs):
            if before is not None:
                board.enter(before)
            result = method(self, *args, **kwargs)
            if after is not None:
                board.enter(after)
            return result

        setattr(ETTTrainer, name, marked)

    around("_run_epoch", STEPS, None)
    around("_save_checkpoint", CHECKPOINT, STEPS)
    around("train", None, END)


def _count_touches(board: Board, folder: str):
    trainer = os.getpid()

    def hook(event: str, arguments: tuple):
        is_touch = event in DELETING or (event in OPENING and folder in str(arguments[0]))
        # TensorBoard opens its file for every value.
        if is_touch and os.getpid() == trainer and "tfevents" not in str(arguments[0]):
            board.touches += 1
            if board.touches == board.last_touch:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# Disturbances


@dataclasses.dataclass
class Disturbance:
    """Something that happens to a run `seconds` after it begins a phase for the `number`-th time, or when it touches a
    file for the `last_touch`-th time."""

    kind: str
    phase: int
    number: int
    seconds: float
    last_touch: int
    draw: np.random.Generator

    def strike(self, run: Run, data: Path, output: Path, start: Callable[[], Run]) -> str | None:
        """Disturbs a run, waits for its end and sets right what was disturbed. While data are missing, a run that has
        a checkpoint may be started in vain. Returns the phase in which the disturbance happened, or `None` where the
        run had ended."""
        if self.kind == AT_FILE:
            return PHASES[run.board.phase] if run.wait() else None
        if not run.wait_for(self.phase, self.number, self.seconds):
            return None
        phase = PHASES[run.board.phase]
        if self.kind == FULL_DISK:
            limit = int(self.draw.choice([0, self.draw.integers(MOST_BYTES)]))
            resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            run.wait()
        elif self.kind == MISSING_DATA:
            stage = STAGES[output.name]
            parts = sorted(data.glob(stage.parts))
            is_open = run.board.phase != START
            with _missing(self.draw.choice(parts) if is_open and self.draw.random() < 0.5 else data / stage.data):
                run.wait()
                if newest_checkpoint(output / "training") and self.draw.random() < 0.5:
                    start().wait()
        elif self.kind == CLOCK:
            run.board.clock = float(self.draw.choice([-1, 1])) * self.draw.uniform(0, 2 * DAY)
            if run.wait_for(self.phase, self.number, self.draw.uniform(0, 2)):
                os.kill(run.pid, signal.SIGKILL)
            run.wait()
        else:
            os.kill(run.pid, signal.Signals[self.kind])
            run.wait()
        return phase


@contextmanager
def _missing(path: Path) -> Iterator[None]:
    away = path.with_name(f".{path.name}.away")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


@dataclasses.dataclass
class Profile:
    """What an undisturbed run is made of: segments (phase, its number among those of the same phase, seconds), and
    touches of files."""

    segments: list[tuple[int, int, float]]
    touches: int


def draw_disturbance(kinds: list[str], profile: Profile, draw: np.random.Generator) -> Disturbance:
    """A disturbance of one of the kinds in any phase, the most in steps; within a phase all moments are alike."""
    phase = draw.choice(len(PHASES), p=(0.2, 0.4, 0.25, 0.15))
    own = [segment for segment in profile.segments if segment[0] == phase]
    lengths = np.array([length for _, _, length in own])
    _, number, length = own[draw.choice(len(own), p=lengths / lengths.sum())]
    kind, last_touch = str(draw.choice(kinds)), int(draw.integers(profile.touches)) + 1
    seconds = float(length * draw.random())
    return Disturbance(kind, int(phase), number, seconds, last_touch if kind == AT_FILE else 0, draw)


def problems_of(run: Run, kind: str | None) -> list[str]:
    """What is wrong with the way in which a run ended."""
    printed = run.log.read_text(errors="replace")
    problems = []
    if run.status not in {0} | (STATUSES[kind] if kind else set()):
        problems.append(f"exit status {run.status} after {kind or 'no disturbance'}: {printed[-600:]}")
    if run.status == 1 and "ett: " not in printed:
        problems.append(f"no sentence after {kind}; see {run.log}")
    # TensorBoard writes in a thread of its own, whose traceback nobody catches.
    is_of_thread = kind == FULL_DISK and "Exception in thread" in printed
    if "Traceback" in printed and not is_of_thread:
        problems.append(f"a traceback after {kind or 'no disturbance'}; see {run.log}")
    return problems


# What is compared


def differences(expected: Path, found: Path) -> list[str]:
    """How two finished folders differ, less durations and paths. Nothing may be left over from an interruption."""
    lines = _compare("files", _names(expected), _names(found))
    for name in sorted(_names(expected) & _names(found)):
        if name not in ("training.json", "README.md"):
            lines += _compare(name, (expected / name).read_bytes(), (found / name).read_bytes())
    lines += _compare("README.md", *(_card(folder) for folder in (expected, found)))
    lines += _compare("training.json", *(_record(folder) for folder in (expected, found)))
    works = [folder / "training" for folder in (expected, found)]
    lines += _compare("training/", *({path.name for path in work.iterdir()} for work in works))
    lines += _compare("samples", *(_contents(work / "samples") for work in works))
    lines += _compare("curves", *(curves(work / "tensorboard") for work in works))
    checkpoints = [newest_checkpoint(work) for work in works]
    if None in checkpoints:
        return [*lines, "there is no checkpoint"]
    return lines + _compare(checkpoints[0].name, *({"name": path.name, **_checkpoint(path)} for path in checkpoints))


def _names(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("training/")}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def _card(folder: Path) -> list[str]:
    return [line for line in (folder / "README.md").read_text().splitlines() if not line.startswith("| time |")]


def _record(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    del record["seconds"]
    return {**record, "history": timeless(record["history"])}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, by name: steps and values. Durations, and the figures of the end, which are those of the
    last start, are left out."""
    # It tells of every restart.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    last_start = ("runtime", "per_second", "train_loss", "total_flos")
    return {
        # A run that is killed at its end says its last words twice.
        name: list(dict.fromkeys((event.step, event.value) for event in events.Scalars(name)))
        for name in events.Tags()["scalars"]
        if not name.endswith(last_start)
    }


def _checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds by file, less what has the run's paths in it."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".pt", ".pth"):
            contents[name] = torch.load(path, weights_only=False)
        elif name == "trainer_state.json":
            state = json.loads(path.read_text())
            contents[name] = {**state, "log_history": timeless(state["log_history"])}
        elif path.is_file() and name not in ("training_args.bin", "files.json"):
            contents[name] = path.read_bytes()
    return contents


def _compare(name: str, expected: Any, found: Any) -> list[str]:
    """Where two structures differ; tensors, arrays and numbers to the last bit."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        expected, found = (value.detach().numpy() for value in (expected, found))
    if isinstance(expected, np.ndarray) and isinstance(found, np.ndarray):
        same = (expected.dtype, expected.shape, expected.tobytes()) == (found.dtype, found.shape, found.tobytes())
        return [] if same else [name]
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{name}: {key!r} is missing" for key in expected.keys() - found.keys()]
        lines += [f"{name}: {key!r} is left over" for key in found.keys() - expected.keys()]
        pairs = [(key, expected[key], found[key]) for key in expected.keys() & found.keys()]
        return lines + [line for key, *values in pairs for line in _compare(f"{name}: {key}", *values)]
    if isinstance(expected, set) and isinstance(found, set):
        lines = [f"{name}: {key!r} is missing" for key in expected - found]
        return lines + [f"{name}: {key!r} is left over" for key in found - expected]
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        if len(expected) != len(found):
            return [f"{name}: {len(found)} entries instead of {len(expected)}"]
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for number, values in pairs for line in _compare(f"{name}: {number}", *values)]
    if repr(expected) == repr(found):
        return []
    return [name if isinstance(expected, bytes) else f"{name}: {found!r} instead of {expected!r}"]


# The campaign


def _prepare_forks():
    """Threads are not forked, and are waited for in vain; a lock that every run made anew would be left over. In a
    process that was spawned itself, workers of data loaders would be spawned, too, and import all libraries."""
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    tqdm.get_lock()


def train_undisturbed(root: Path, names: list[str]):
    """Trains the stages, each from the one before, and writes how long their phases took."""
    _prepare_forks()
    profiles = {}
    for name in names:
        run = Run(command(name, root, root / "whole" / name), root / f"whole-{name}.txt", root / "cache" / name)
        if run.wait():
            raise SystemExit(f"The undisturbed run of {name} failed: {run.log.read_text()[-3000:]}")
        profiles[name] = [run.board.segments(), run.board.touches]
    (root / "profiles.json").write_text(json.dumps(profiles))


def needed(names: list[str]) -> list[str]:
    """The stages with those that they start from, in their order."""
    wanted = set(names)
    for name, stage in reversed(STAGES.items()):
        if name in wanted and stage.start:
            wanted.add(stage.start)
    return [name for name in STAGES if name in wanted]


@dataclasses.dataclass
class Result:
    """What came of a run that was disturbed."""

    stage: str
    struck: list[tuple[str, str]]
    starts: int
    problems: list[str]


def disturb(
    name: str,
    root: Path,
    folder: Path,
    profile: Profile,
    kinds: list[str],
    most: int,
    draw: np.random.Generator,
    report: Callable[[], None],
) -> Result:
    """Trains a stage, disturbed up to `most` times, until it ends, and compares it with the undisturbed run."""
    result = Result(name, [], 0, [])
    output = folder / name

    def start(last_touch: int = 0) -> Run:
        result.starts += 1
        log = folder / f"start-{result.starts}.txt"
        return Run(command(name, root, output), log, folder / "cache", last_touch)

    while not result.problems:
        if result.starts >= MOST_STARTS:
            result.problems.append(f"it has not ended after {result.starts} starts")
            break
        disturbance = draw_disturbance(kinds, profile, draw) if len(result.struck) < most else None
        run, phase = start(disturbance.last_touch if disturbance else 0), None
        try:
            phase = disturbance.strike(run, root / "data", output, start) if disturbance else None
            status = run.wait()
        except TimeoutError as error:
            result.problems.append(str(error))
            break
        if phase is not None:
            result.struck.append((disturbance.kind, phase))
            report()
        result.problems += problems_of(run, disturbance.kind if phase else None)
        if status == 0 and not result.problems:
            result.problems += differences(root / "whole" / name, output)
            break
    return result


def soak(names: list[str], kinds: list[str], kills: int, seed: int, root: Path) -> list[Result]:
    """Disturbs runs of each stage until there were `kills` disturbances in all."""
    _prepare_forks()
    make_data(root / "data")
    fresh = multiprocessing.get_context("spawn").Process(target=train_undisturbed, args=(root, needed(names)))
    # Another process has other hashes of strings, as another start by hand would.
    fresh.start()
    fresh.join()
    if fresh.exitcode:
        raise SystemExit(fresh.exitcode)
    profiles = {name: Profile(*values) for name, values in json.loads((root / "profiles.json").read_text()).items()}
    results: list[Result] = []
    with tqdm(total=kills, desc="Soak", unit="kill", dynamic_ncols=True) as bar:
        for number, name in zip(itertools.count(), itertools.cycle(names)):
            left = kills - sum(len(result.struck) for result in results)
            if left <= 0:
                return results
            bar.set_postfix_str(name)
            draw = np.random.default_rng((seed, number, list(STAGES).index(name)))
            folder = root / f"run-{number:03}-{name}"
            folder.mkdir()
            most = min(left, int(draw.integers(1, 4)))
            result = disturb(name, root, folder, profiles[name], kinds, most, draw, bar.update)
            results.append(result)
            if result.problems:
                story = ", ".join(f"{kind} in {phase}" for kind, phase in result.struck)
                bar.write(f"{folder} ({story or 'undisturbed'}):")
                for problem in result.problems[:10]:
                    bar.write(f"  {problem}")
            else:
                shutil.rmtree(folder)


def table(results: list[Result]) -> Table:
    """Disturbances by kind and phase, then by stage."""
    struck = collections.Counter(pair for result in results for pair in result.struck)
    shown = Table(title="Disturbances")
    for column in ("", *PHASES, "all", "runs", "starts", "differ"):
        shown.add_column(column, justify="right" if column else "left")

    def add(label: str, counts: collections.Counter, own: list[Result]):
        numbers = [counts[phase] for phase in PHASES]
        differing = sum(bool(result.problems) for result in own)
        figures = (*numbers, sum(numbers), len(own), sum(result.starts for result in own), differing)
        shown.add_row(label, *map(str, figures))

    for kind in KINDS:
        own = [result for result in results if any(kind == other for other, _ in result.struck)]
        add(kind, collections.Counter({phase: struck[kind, phase] for phase in PHASES}), own)
    shown.add_section()
    for name in dict.fromkeys(result.stage for result in results):
        own = [result for result in results if result.stage == name]
        add(name, collections.Counter(phase for result in own for _, phase in result.struck), own)
    shown.add_section()
    add("all", collections.Counter(phase for result in results for _, phase in result.struck), results)
    return shown


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="disturbances in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments (%(default)s)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="by default all")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="by default all")
    parser.add_argument("--folder", type=Path, help="empty folder for runs; those that differ stay there")
    return parser.parse_args()


def main_of_soak():
    options = parse()
    root = Path(options.folder or tempfile.mkdtemp(prefix="soak-")).resolve()
    begin = time.monotonic()
    results = soak(options.stage, options.kind, options.kills, options.seed, root)
    Console(width=100).print(table(results))
    print(f"{time.monotonic() - begin:.0f} s")
    if any(result.problems for result in results):
        sys.exit(f"Runs differ; they are in {root}.")
    shutil.rmtree(root)


if __name__ == "__main__":
    main_of_soak()
