"""What [`miniature_ett.schedule`] shows of running tasks: a live table in a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import AbstractContextManager

from .schedule_plan import Outcome, Plan, Task


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
            seconds = "" if outcome.status == "skipped" else format_seconds(outcome.seconds)
            table.add_row(name, outcome.status, "", "", seconds, style="dim")
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


__all__ = ["LineDisplay", "TableDisplay", "describe_outcome", "format_seconds"]
