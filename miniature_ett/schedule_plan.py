"""Tasks that depend on each other: which can start, how each ended, and how long the rest may take."""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """A unit of work for one worker.

    Args:
        name: Its unique name.
        function: Function of a module, called as `function(report, **arguments)` (see [`schedule.Report`]). The
            worker imports the module; arguments and result are pickled.
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


__all__ = ["Outcome", "Plan", "Task", "check_tasks"]
