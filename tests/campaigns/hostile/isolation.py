"""One case in one process: forked from a warm parent, limited in time and memory, its folder looked at afterwards."""

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20
"""Longest time of a case."""

MEMORY = 2 * 2**30
"""Most bytes by which the memory of a case may grow."""

HARD_MEMORY = 2 * MEMORY
"""Bytes of address space that the system gives a case; it has more than it uses."""

LONGEST_SENTENCE = 1000
TEMPORARY = (".tmp", ".incomplete", ".partial", ".lock")


class Refused(Exception):
    """The project refused the input with a sentence, which the message holds."""


class Wrong(Exception):
    """The project did something else than it should, as the message says."""


@dataclass
class Place:
    """Folders of a case.

    Args:
        inputs: Hostile files; nothing may change them.
        outputs: The working directory. A refused case leaves nothing new here.
        models: Models that all cases share.
        cache: What libraries keep for themselves; it is not looked at.
        resumable: Whether what the case calls may leave whole files of an unfinished work.
    """

    inputs: Path
    outputs: Path
    models: Path
    cache: Path
    resumable: bool = False


@dataclass
class Result:
    """
    Args:
        status: `success` or `sentence`, which are as they should be; else what went wrong.
        detail: The sentence, or what is known of the failure.
    """

    name: str
    status: str
    detail: str
    seconds: float = 0.0
    megabytes: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status in ("success", "sentence")


Case = Callable[[Place], Iterator[None]]
"""A generator function: it writes the inputs, yields, and then calls the project."""


def run_cases(cases: Iterable[tuple[str, Case]], root: Path, models: Path, workers: int) -> Iterator[Result]:
    """Runs cases in processes of their own, `workers` at a time; a result comes when its case has ended.

    The folder of a case is there while its result is looked at, and is removed after that.
    """
    waiting, running = iter(cases), {}
    try:
        while True:
            while len(running) < workers and (case := next(waiting, None)) is not None:
                pid = _start(*case, root, models)
                running[pid] = case[0], time.monotonic()
            if not running:
                return
            for pid, (name, start) in list(running.items()):
                seconds = time.monotonic() - start
                if seconds > SECONDS:
                    os.kill(pid, signal.SIGKILL)
                ended, status, usage = os.wait4(pid, 0 if seconds > SECONDS else os.WNOHANG)
                if ended:
                    del running[pid]
                    _kill_group(pid)
                    yield _result(name, root / name, status, usage.ru_maxrss, seconds)
                    shutil.rmtree(root / name, ignore_errors=True)
            time.sleep(0.005)
    finally:
        for pid in running:
            _kill_group(pid)
            os.waitpid(pid, 0)


def _kill_group(pid: int):
    """Ends what a case has started and not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _start(name: str, case: Case, root: Path, models: Path) -> int:
    folder = root / name
    place = Place(folder / "inputs", folder / "outputs", models, folder / "cache")
    for path in (place.inputs, place.outputs, place.cache):
        path.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            _run(case, place)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    # In both processes, so that it is done whichever goes on first.
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    return pid


def _run(case: Case, place: Place):
    """The child's whole life. What it writes at last is the outcome."""
    log = os.open(place.inputs.parent / "log", os.O_WRONLY | os.O_CREAT)
    for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(target, number)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + HARD_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS - 1)
    os.chdir(place.outputs)
    status, detail = _outcome(case, place)
    outcome = {"status": status, "detail": detail, "before": before}
    temporary = place.inputs.parent / "outcome.part"
    temporary.write_text(json.dumps(outcome))
    temporary.rename(place.inputs.parent / "outcome")


def _outcome(case: Case, place: Place) -> tuple[str, str]:
    steps = case(place)
    next(steps)
    files = _files(place.inputs.parent)
    try:
        next(steps, None)
        status, detail = "success", ""
    except Wrong as error:
        return "wrong", str(error)
    except (Refused, ValueError, OSError, ImportError) as error:
        status, detail = "sentence", str(error)
        if problem := _unreadable(detail):
            return problem, f"{type(error).__name__}: {detail[:2000]}\n{traceback.format_exc()[-3000:]}"
        if "alloc" in detail.lower() or isinstance(error, MemoryError):
            return "memory", detail
    except MemoryError:
        return "memory", traceback.format_exc()[-3000:]
    except BaseException as error:
        return f"raw {type(error).__name__}", traceback.format_exc()[-4000:]
    if problem := _leftovers(files, _files(place.inputs.parent), status == "success" or place.resumable):
        return "leftovers", f"{problem} ({detail})"
    return status, detail


def _unreadable(sentence: str) -> str | None:
    """What keeps a message from being one readable sentence."""
    if "\n" in sentence.strip():
        return "several lines"
    if len(sentence) > LONGEST_SENTENCE:
        return "too long"
    if len(sentence.split()) < 3:
        return "no sentence"
    return None


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, by its path; of the case's own files nothing."""
    own = ("log", "outcome.part", "cache")
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in own and not path.is_dir()
    }


def _leftovers(before: dict, after: dict, may_write: bool) -> str | None:
    changed = sorted(path for path in before | after if before.get(path) != after.get(path))
    outside = [path for path in changed if not path.startswith("outputs/")]
    if outside:
        return f"it changed {', '.join(outside[:3])}"
    halves = [path for path in changed if path.endswith(TEMPORARY)]
    if halves:
        return f"it left {', '.join(halves[:3])}"
    if changed and not may_write:
        return f"it was refused, and left {', '.join(changed[:3])}"
    return None


def _shortened(log: str) -> str:
    return log if len(log) <= 6000 else f"{log[:2000]}\n[...]\n{log[-4000:]}"


def _result(name: str, folder: Path, status: int, peak: int, seconds: float) -> Result:
    log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    log = _shortened(log.partition("\nExtension modules:")[0])
    if not (folder / "outcome").exists():
        number = os.waitstatus_to_exitcode(status)
        if seconds > SECONDS:
            return Result(name, "hang", log, seconds)
        return Result(name, "crash", f"exit code {number}\n{log}", seconds)
    outcome = json.loads((folder / "outcome").read_text())
    megabytes = (peak - outcome["before"]) / 1024
    result = Result(name, outcome["status"], outcome["detail"], seconds, megabytes)
    if result.passed and megabytes * 2**20 > MEMORY:
        result.status = "memory"
    return result


__all__ = ["Case", "Place", "Refused", "Result", "Wrong", "run_cases"]
