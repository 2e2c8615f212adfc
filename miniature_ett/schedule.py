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
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Report = Callable[[int, int], None]
"""What a task calls with the steps that it has done and the steps that it will do in all."""

REPORT_SECONDS = 0.5
STOP_SECONDS = 60
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1, -signal.SIGTERM)
"""Exit codes of a worker that ended at a signal, with a checkpoint where it was training."""


@dataclass(frozen=True)
class Task:
    """A unit of work for one worker.

    Args:
        name: Its unique name.
        function: Function of a module, called as `function(report, **arguments)` (see [`Report`]). The worker imports
            the module; arguments and result are pickled.
        needs: Names of the tasks that must be done first.
        seconds: Expected time. Measured times of tasks of the same `kind` take its place.
        threads: Threads of torch; `None` for all. A task with all threads runs alone.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seconds: float = 60.0
    kind: str = ""
    threads: int | None = 1


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Args:
        status: `"done"`, `"failed"`, or `"skipped"` where a task that it needs failed.
        seconds: Time that it took; 0 for a skipped task.
        value: What its function returned.
        error: Class name of the exception.
        message: The exception as one sentence; for a skipped task the name of the failed one.
    """

    status: str
    seconds: float = 0.0
    value: Any = None
    error: str | None = None
    message: str = ""


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


def check_tasks(tasks: Sequence[Task]):
    """Raises `ValueError` where the tasks cannot be ordered (see [`run_tasks`])."""
    waiting = {}
    for task in tasks:
        if task.name in waiting:
            raise ValueError(f"Two tasks have the name '{task.name}'; give each its own.")
        waiting[task.name] = set(task.needs)
    for name, needs in waiting.items():
        if unknown := needs - set(waiting):
            raise ValueError(f"The task '{name}' needs '{min(unknown)}', which is no task.")
    while waiting:
        free = [name for name, needs in waiting.items() if not needs & set(waiting)]
        if not free:
            raise ValueError(f"The tasks {', '.join(waiting)} need each other in a circle.")
        for name in free:
            del waiting[name]


@dataclass
class Run:
    """A running task: its start, the first step that it reported and when, and the last."""

    start: float
    first: tuple[int, float] | None = None
    step: int = 0
    steps: int = 0

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier run did a part of the steps, so that its time says little about the whole."""
        return self.first is not None and self.first[0] > 1

    def rate(self) -> float | None:
        """Steps a second, or `None` before the second report."""
        if self.first is None or self.step == self.first[0]:
            return None
        return (self.step - self.first[0]) / (time.monotonic() - self.first[1])


class Plan:
    """Which tasks are waiting, running and ended, and how long the rest may take."""

    def __init__(self, tasks: Sequence[Task], processes: int, done: Collection[str]):
        self.tasks = {task.name: task for task in tasks}
        self.processes = processes
        self.done = set(done) & set(self.tasks)
        self.total = len(self.tasks) - len(self.done)
        self.waiting = [task for task in tasks if task.name not in self.done]
        self.running: dict[str, Run] = {}
        self.resumed: set[str] = set()
        self.outcomes: dict[str, Outcome] = {}

    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    def take_startable(self) -> list[Task]:
        """Moves the tasks that can start now from waiting to running. A task whose needs are met waits for its threads
        in line: no later task overtakes it."""
        started = []
        for task in list(self.waiting):
            if not self.done.issuperset(task.needs):
                continue
            busy = sum(self.threads(self.tasks[name]) for name in self.running)
            if busy + self.threads(task) > self.processes:
                break
            self.waiting.remove(task)
            self.running[task.name] = Run(time.monotonic())
            started.append(task)
        return started

    def threads(self, task: Task) -> int:
        return self.processes if task.threads is None else min(task.threads, self.processes)

    def begin(self, task: Task):
        """Restarts a running task's clock: its worker is up."""
        self.running[task.name].start = time.monotonic()

    def report(self, task: Task, step: int, steps: int):
        """Records a running task's progress."""
        run = self.running[task.name]
        run.first = run.first or (step, time.monotonic())
        run.step, run.steps = step, steps

    def end(self, task: Task, outcome: Outcome) -> list[tuple[Task, Outcome]]:
        """Records a running task's outcome. Returns it, and those of the tasks that are skipped because of it."""
        if self.running.pop(task.name).is_resumed:
            self.resumed.add(task.name)
        ended = [(task, outcome)]
        if outcome.status == "done":
            self.done.add(task.name)
        else:
            missing = {task.name}
            while skipped := [other for other in self.waiting if missing & set(other.needs)]:
                for other in skipped:
                    self.waiting.remove(other)
                    missing.add(other.name)
                    ended.append((other, Outcome("skipped", error=outcome.error, message=task.name)))
        self.outcomes |= {each.name: result for each, result in ended}
        return ended

    def seconds_left(self) -> float | None:
        """Expected time until the end, corrected by the tasks so far; `None` before the first measured task."""
        now = time.monotonic()
        measured = [
            (self.tasks[name], outcome.seconds)
            for name, outcome in self.outcomes.items()
            if outcome.status == "done" and name not in self.resumed
        ]
        left: dict[str, float] = {}
        for name, run in self.running.items():
            if rate := run.rate():
                left[name] = (run.steps - run.step) / rate
                if not run.is_resumed:
                    measured.append((self.tasks[name], now - run.start + left[name]))
        if not measured:
            return None
        pace = sum(seconds for _, seconds in measured) / max(1e-9, sum(task.seconds for task, _ in measured))
        by_kind = defaultdict(list)
        for task, seconds in measured:
            by_kind[task.kind].append(seconds)

        def expected(task: Task) -> float:
            same = by_kind.get(task.kind) if task.kind else None
            return sum(same) / len(same) if same else pace * task.seconds

        for name, run in self.running.items():
            left.setdefault(name, max(0.0, expected(self.tasks[name]) - (now - run.start)))
        work = sum(seconds * self.threads(self.tasks[name]) for name, seconds in left.items())
        work += sum(expected(task) * self.threads(task) for task in self.waiting)
        return max([work / self.processes, *left.values()])


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
        worker = self.idle.pop() if self.idle else Worker(self.processes, self.log)
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
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


# What is shown


class LineDisplay(AbstractContextManager):
    """A line for each task that starts or ends."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __exit__(self, *error):
        pass

    def started(self, task: Task):
        self.write(f"{task.name}: started")

    def ended(self, task: Task, outcome: Outcome):
        text = describe_outcome(outcome)
        self.write(f"{task.name}: {text} \N{MIDDLE DOT} {describe_plan(self.plan)}")

    def refresh(self):
        pass

    def write(self, text: str):
        print(text, file=sys.stderr, flush=True)


class TableDisplay(AbstractContextManager):
    """A table that is rewritten in place: running tasks with steps and rate, the last that ended, the next in line."""

    ENDED, NEXT = 5, 5

    def __init__(self, plan: Plan):
        from rich.console import Console
        from rich.live import Live

        self.plan = plan
        self.live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> "TableDisplay":
        self.live.start()
        return self

    def __exit__(self, *error):
        self.live.stop()

    def started(self, task: Task):
        pass

    def ended(self, task: Task, outcome: Outcome):
        if outcome.status == "failed":
            self.live.console.print(f"{task.name}: {describe_outcome(outcome)}", markup=False, highlight=False)

    def refresh(self):
        self.live.update(self.table(), refresh=True)

    def table(self):
        from rich.table import Table

        table = Table(title=describe_plan(self.plan), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in ("task", "state", "steps", "steps/s", "time"):
            table.add_column(name, justify="left" if name in ("task", "state") else "right")
        for name, outcome in list(self.plan.outcomes.items())[-self.ENDED :]:
            table.add_row(name, outcome.status, "", "", format_seconds(outcome.seconds), style="dim")
        for name, run in self.plan.running.items():
            steps = f"{run.step:,}/{run.steps:,}" if run.first else ""
            rate = f"{rate:.2f}" if (rate := run.rate()) else ""
            table.add_row(name, "running", steps, rate, format_seconds(time.monotonic() - run.start), style="bold")
        for task in self.plan.waiting[: self.NEXT]:
            table.add_row(task.name, "waiting", "", "", "", style="dim")
        if (more := len(self.plan.waiting) - self.NEXT) > 0:
            table.add_row(f"and {more} more", "waiting", "", "", "", style="dim")
        return table


def describe_plan(plan: Plan) -> str:
    """How many tasks are done, and how long the rest may take."""
    statuses = [outcome.status for outcome in plan.outcomes.values()]
    parts = [f"{statuses.count('done')} of {plan.total} tasks done"]
    parts += [f"{statuses.count(name)} {name}" for name in ("failed", "skipped") if name in statuses]
    if not plan.is_finished():
        left = plan.seconds_left()
        parts.append("time left not known yet" if left is None else f"about {format_seconds(left)} left")
    return ", ".join(parts)


def describe_outcome(outcome: Outcome) -> str:
    if outcome.status == "done":
        return f"done in {format_seconds(outcome.seconds)}"
    if outcome.status == "skipped":
        return f"skipped because '{outcome.message}' failed"
    return f"failed: {outcome.message}"


def format_seconds(seconds: float) -> str:
    """A duration in at most two units.

    >>> format_seconds(3725)
    '1 h 2 min'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


__all__ = ["Outcome", "Report", "StopTasks", "Task", "peak_memory_gb", "run_tasks"]
