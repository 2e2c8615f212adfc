"""Runs tasks that depend on each other in a pool of worker processes and shows a live table with the time left.

- Workers are spawned once and take one task after the other. Each task has its own number of threads.
- A task that raises is recorded, the tasks that need it are skipped, and all others go on.
- After Ctrl-C or SIGTERM the workers get SIGTERM, upon which training writes a checkpoint. The same call goes on.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .schedule_display import LineDisplay, TableDisplay
from .schedule_plan import Outcome, Plan, Task, check_tasks

Report = Callable[[int, int], None]
"""What a task calls with the steps that it has done and the steps that it will do in all."""

REPORT_SECONDS = 0.5
STOP_SECONDS = 60
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1, -signal.SIGTERM)
"""Exit codes of a worker that ended at a signal, with a checkpoint where it was training."""


class StopTasks(Exception):
    """Raised by a task to end all tasks, for instance where the disk is full. The message is for the user."""


def run_tasks(
    tasks: Sequence[Task],
    processes: int | None = None,
    done: Collection[str] = (),
    on_end: Callable[[Task, Outcome], None] | None = None,
    log: Path | None = None,
) -> dict[str, Outcome]:
    """Runs all tasks, in their order as far as their needs allow.

    Args:
        processes: Number of workers and, in total, of threads; by default the number of usable cores.
        done: Names of tasks that an earlier run finished. These do not run.
        on_end: Called in this process after each task that ran or was skipped.
        log: File to which workers append what they print; by default they print to stderr.

    Returns:
        The outcome of each task that was not in `done`.

    Raises:
        ValueError: Two tasks have the same name, or a task needs an unknown task or, in a circle, itself.
        StopTasks: A task raised it. The other tasks were stopped.
        KeyboardInterrupt, SystemExit: After Ctrl-C or SIGTERM. The workers have ended.
    """
    processes = processes or usable_cores()
    check_tasks(tasks)
    plan = Plan(tasks, processes, done)
    pool = Pool(processes, log)
    display = (TableDisplay if sys.stderr.isatty() else LineDisplay)(plan)

    with sigterm_raises(), display, pool:
        while not plan.is_finished():
            for task in plan.take_startable():
                pool.start(task)
                display.started(task)
            for task, outcome in pool.wait(plan):
                for ended, result in plan.end(task, outcome):
                    if on_end is not None:
                        on_end(ended, result)
                    display.ended(ended, result)
            display.refresh()
    return plan.outcomes


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Workers


class Pool:
    """Worker processes. A worker that dies fails its task and is replaced. On exit all workers are stopped."""

    def __init__(self, processes: int, log: Path | None):
        self.processes, self.log = processes, log
        self.idle: list[Worker] = []
        self.busy: dict[Connection, Worker] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error):
        workers = [*self.idle, *self.busy.values()]
        for worker in self.idle:
            worker.connection.close()
        for worker in self.busy.values():
            worker.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()

    def start(self, task: Task):
        alive = [worker for worker in self.idle if worker.process.is_alive()]
        worker = alive.pop() if alive else Worker(self.processes, self.log)
        self.idle = alive
        worker.begin(task)
        self.busy[worker.connection] = worker

    def wait(self, plan: Plan) -> Iterator[tuple[Task, Outcome]]:
        """Waits briefly for messages, tells the plan of progress and gives the tasks that ended.

        Raises:
            StopTasks: A task raised it.
            SystemExit: A worker was ended by a signal that is for the whole run.
        """
        for connection in wait(list(self.busy), timeout=REPORT_SECONDS):
            worker = self.busy[connection]
            try:
                kind, content = connection.recv()
            except (EOFError, ConnectionResetError):
                del self.busy[connection]
                worker.process.join()
                code = worker.process.exitcode
                if code in STOPPED:
                    raise SystemExit(128 + signal.SIGTERM) from None
                how = f"ended with exit code {code}"
                if code < 0:
                    how = f"was killed by signal {-code}" + (", perhaps for lack of memory" if code == -9 else "")
                yield worker.task, Outcome("failed", error="WorkerDied", message=f"The worker process {how}.")
                continue
            if kind == "begun":
                plan.begin(worker.task)
            elif kind == "progress":
                plan.report(worker.task, *content)
            elif kind == "stop":
                raise StopTasks(content)
            else:
                del self.busy[connection]
                self.idle.append(worker)
                yield worker.task, content


class Worker:
    """A process that takes tasks over a connection."""

    def __init__(self, threads: int, log: Path | None):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, threads, log), daemon=True)
        self.process.start()
        # While this process holds the other end, the end of the worker would go unnoticed.
        other.close()

    def begin(self, task: Task):
        self.task = task
        self.connection.send(task)


def work(connection: Connection, threads: int, log: Path | None):
    """The worker's loop: receives tasks and sends their progress and results until the connection closes."""
    # Ctrl-C reaches every process of the terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Numpy's own threads would crowd out the other workers; it reads the variable when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import torch

    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
    with suppress(EOFError, BrokenPipeError):
        while True:
            task: Task = connection.recv()
            torch.set_num_threads(task.threads or threads)
            reset_peak_memory()
            # The log may be on a full disk.
            with suppress(OSError):
                print(f"== {task.name}", file=sys.stderr, flush=True)
            connection.send(("begun", None))
            connection.send(run_task(task, throttled(connection)))


def run_task(task: Task, report: Report) -> tuple[str, Any]:
    """Calls a task's function and returns the message for the parent."""
    start = time.monotonic()
    try:
        value = task.function(report, **task.arguments)
    except StopTasks as error:
        return "stop", str(error)
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        return "ended", Outcome("failed", time.monotonic() - start, error=type(error).__name__, message=message)
    return "ended", Outcome("done", time.monotonic() - start, value)


def throttled(connection: Connection) -> Report:
    """A report that is sent at most every [`REPORT_SECONDS`]."""
    last = 0.0

    def report(step: int, steps: int):
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            try:
                connection.send(("progress", (step, steps)))
            except BrokenPipeError:
                # The parent was killed: end as if it had stopped this worker.
                os.kill(os.getpid(), signal.SIGTERM)

    return report


def reset_peak_memory():
    """Restarts the count of [`peak_memory_gb`] where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Largest resident memory of this process in GiB since [`reset_peak_memory`], or since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**3 if sys.platform == "darwin" else 1024**2)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within it, SIGTERM raises `SystemExit(143)`, so that what has to be closed is closed."""

    def leave(number, frame):
        print("SIGTERM: the workers are stopped. Run the same command again to go on.", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


__all__ = ["Outcome", "Report", "StopTasks", "Task", "peak_memory_gb", "run_tasks"]
