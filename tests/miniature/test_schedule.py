"""The scheduler: order, threads, failures, dead workers, signals, and the time left."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from ett.miniature_ett import schedule
from ett.miniature_ett.schedule import StopTasks, run_tasks
from ett.miniature_ett.schedule_display import TableDisplay
from ett.miniature_ett.schedule_plan import Outcome, Plan, Task

ROOT = Path(__file__).parents[2]


def note(report, folder, name, meets=(), seconds=0.0):
    """Writes when it started and ended, with how many threads and where; before, waits for the tasks that it meets."""
    import torch

    start = time.time()
    Path(folder, f".{name}").touch()
    for other in meets:
        wait_for(Path(folder, f".{other}"))
    time.sleep(seconds)
    Path(folder, name).write_text(f"{start} {time.time()} {torch.get_num_threads()} {os.getpid()}")
    return name


def fail(report):
    raise ValueError("no such\n thing")


def stop(report):
    raise StopTasks("The disk is full.")


def die(report):
    os.kill(os.getpid(), signal.SIGKILL)


def noted(folder):
    return {path.name: [float(word) for word in path.read_text().split()] for path in folder.glob("[!.]*")}


def task(name, *needs, function=note, **fields):
    return Task(name, function, needs=needs, **fields)


def test_tasks_run_in_their_order_with_their_threads_and_results_come_back(tmp_path, capfd):
    def noting(name, *needs, meets=(), threads=1):
        return task(name, *needs, arguments={"folder": tmp_path, "name": name, "meets": meets}, threads=threads)

    tasks = [
        noting("d", "b", "c"),
        noting("a", threads=None),
        noting("b", "a", meets=("c",)),
        noting("c", "a", meets=("b",)),
    ]
    ended = []
    outcomes = run_tasks(tasks, processes=2, on_end=lambda task, outcome: ended.append(task.name))
    assert {name: (outcome.status, outcome.value) for name, outcome in outcomes.items()} == {
        name: ("done", name) for name in "abcd"
    }
    times = noted(tmp_path)
    assert times["a"][1] <= min(times["b"][0], times["c"][0])
    assert max(times["b"][1], times["c"][1]) <= times["d"][0]
    assert [times[name][2] for name in "abcd"] == [2, 1, 1, 1]
    assert len({pid for *_, pid in times.values()}) == 2
    assert ended[0] == "a" and set(ended[1:3]) == {"b", "c"} and ended[-1] == "d"
    assert "d: done in 0 s · 4 of 4 tasks done" in capfd.readouterr().err


def test_a_failed_task_is_recorded_its_dependents_are_skipped_and_others_go_on_from_what_is_done(tmp_path, capfd):
    tasks = [
        task("bad", function=fail),
        task("after", "bad"),
        task("later", "after"),
        task("killed", function=die),
        task("earlier", function=fail),
        task("good", "earlier", arguments={"folder": tmp_path, "name": "good"}),
    ]
    outcomes = run_tasks(tasks, processes=1, done={"earlier"}, log=tmp_path / "log.txt")
    told = {name: (outcome.status, outcome.error, outcome.message) for name, outcome in outcomes.items()}
    assert told == {
        "bad": ("failed", "ValueError", "no such thing"),
        "after": ("skipped", "ValueError", "bad"),
        "later": ("skipped", "ValueError", "bad"),
        "killed": (
            "failed",
            "WorkerDied",
            "The worker process was killed by signal 9, perhaps for lack of memory.",
        ),
        "good": ("done", None, ""),
    }
    assert "later: skipped because 'bad' failed" in capfd.readouterr().err
    log = (tmp_path / "log.txt").read_text()
    assert "== bad" in log and "Traceback" in log


def test_a_task_can_stop_all(tmp_path):
    waiting = task("long", arguments={"folder": tmp_path, "name": "long", "seconds": 60})
    start = time.monotonic()
    with pytest.raises(StopTasks, match="The disk is full"):
        run_tasks([waiting, task("full", function=stop)], processes=2)
    assert time.monotonic() - start < 50
    assert not multiprocessing.active_children() and not noted(tmp_path)


SCRIPT = """
    import signal, sys, time
    from pathlib import Path
    from ett.miniature_ett import schedule

    def slow(report, folder):
        from ett.train.checkpointing.interruption import Interruption, TrainingInterrupted
        with Interruption() as interruption:
            Path(folder, "started").touch()
            for step in range(600):
                report(step + 1, 600)
                time.sleep(0.1)
                if interruption.received:
                    Path(folder, "checkpoint").touch()
                    raise TrainingInterrupted(interruption.received, step)

    if __name__ == "__main__":
        # A shell that starts the tests in the background has SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        schedule.run_tasks([schedule.Task("slow", slow, {"folder": sys.argv[1]})], processes=1)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2), (signal.SIGKILL, -9)])
def test_a_signal_ends_the_workers_which_leave_what_training_leaves(tmp_path, number, code):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "started")
    parent.send_signal(number)
    assert parent.wait(60) == code
    # Of a killed parent the worker learns when it reports.
    wait_for(tmp_path / "checkpoint")


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("a"), task("a")], "Two tasks have the name 'a'"),
        ([task("a", "b")], "The task 'a' needs 'b', which is no task"),
        ([task("a", "b"), task("b", "a"), task("c")], "The tasks a, b need each other in a circle"),
    ],
)
def test_tasks_that_cannot_be_ordered_are_an_error(tasks, message):
    with pytest.raises(ValueError, match=message):
        run_tasks(tasks)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now[0])
    return now


def test_a_task_with_all_threads_runs_alone_and_none_overtakes_it():
    plan = Plan([task("a"), task("alone", threads=None), task("b")], 2, ())
    assert [each.name for each in plan.take_startable()] == ["a"]
    plan.end(plan.tasks["a"], Outcome("done", 1.0))
    assert [each.name for each in plan.take_startable()] == ["alone"]
    assert plan.take_startable() == []
    plan.end(plan.tasks["alone"], Outcome("done", 1.0))
    assert [each.name for each in plan.take_startable()] == ["b"]


def test_the_time_left_follows_measured_times_and_rates(clock):
    tasks = [task(name, seconds=100, kind=name[0]) for name in ("a1", "a2", "b1", "b2")]
    plan = Plan(tasks, 2, ())
    plan.take_startable()
    assert plan.seconds_left() is None
    clock[0] = 50
    plan.end(tasks[0], Outcome("done", 50.0))
    # What runs is of the kind that takes 50 s; the two others are twice as fast as planned, too.
    assert plan.seconds_left() == 50
    plan.take_startable()
    plan.report(tasks[2], 1, 101)
    clock[0] = 60
    plan.report(tasks[2], 11, 101)
    # b1 has 90 steps at one a second, and lasts 100 s, as b2 will.
    assert plan.seconds_left() == pytest.approx((90 + 100) / 2)


def test_the_rate_of_a_resumed_task_counts_its_own_steps_alone(clock):
    plan = Plan([task("a", seconds=10)], 1, ())
    plan.take_startable()
    plan.report(plan.tasks["a"], 501, 1001)
    clock[0] = 10
    plan.report(plan.tasks["a"], 511, 1001)
    assert plan.running["a"].rate() == 1
    assert plan.seconds_left() is None, "nothing is measured from beginning to end"


def test_the_table_shows_what_ended_runs_and_waits(clock):
    plan = Plan([task(f"task {number}", seconds=10) for number in range(10)], 2, ("task 9",))
    plan.take_startable()
    plan.end(plan.tasks["task 0"], Outcome("done", 10.0))
    plan.report(plan.tasks["task 1"], 1, 2001)
    clock[0] = 10
    plan.report(plan.tasks["task 1"], 1001, 2001)
    display = TableDisplay(plan)
    text = io.StringIO()
    Console(file=text, width=100).print(display.table())
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    # Of 9 tasks one is done in 10 s; one runs, in 20 s; 7 wait, of 15 s each: 115 s of 2 processes.
    assert lines[0] == "1 of 9 tasks done, about 58 s left"
    assert "task 0 done 10 s" in lines
    assert "task 1 running 1,001/2,001 100.00 10 s" in lines
    assert lines[-1] == "and 2 more waiting"
