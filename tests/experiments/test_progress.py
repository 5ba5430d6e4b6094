from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from experiments.core import observe as progress
from experiments.core.observe import Display, Progress, Relay, describe

RECORD = {
    "status": "done",
    "wall_time_s": 3.2,
    "metrics": {"test_accuracy": 0.5, "train_accuracy": 0.75},
}


@pytest.fixture
def terminal(monkeypatch):
    """What a rich display would write to a terminal."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    monkeypatch.setattr("rich.live.get_console", lambda: console)
    return out


def drive(**settings):
    with Progress(3, 1, **settings) as told:
        told.say("1 of 3 cells were done before.")
        told.begin("vit n=10", 100, step=20)
        told.update(50, 1.25)
        told.update(100, 0.5)
        told.finish("vit n=10", RECORD)
    return told


def test_not_a_terminal_gets_plain_lines_alone(capsys):
    assert drive().done == 2
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 cells were done before.",
        "vit n=10: test accuracy 0.5000, train accuracy 0.7500 (3 s)",
    ]


def test_a_terminal_shows_cells_rate_and_loss(terminal, capsys):
    drive(live=True)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for part in (
        "vit n=10", "20/100", "50/100", "step/s", "loss 1.2500", "loss 0.5000",
        "1 of 3 cells done", "2 of 3 cells done", "test accuracy 0.5000",
    ):  # fmt: skip
        assert part in shown, part
    assert "\x1b[" in terminal.getvalue() and capsys.readouterr().out == ""


def test_the_time_left_counts_what_is_half_done(terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = Display(4)
    display.start()
    display.draw([], 1)
    now[0] += 120.0
    display.draw([dict(label="vit", updates=10, step=5)], 2)
    display.stop()
    # 1.5 cells in 2 minutes, 1.5 more to go.
    assert "about 2 min left" in terminal.getvalue()


def test_a_worker_tells_its_parent_which_draws_for_all(terminal, monkeypatch):
    messages = []

    class Queue:
        put = staticmethod(messages.append)

    with Progress(3, live=True) as parent:
        for worker in 0, 1:
            told = Relay(worker, Queue)
            told.begin(f"cell {worker}", 10)
            told.update(5, 0.5)
            told.update(6, 0.4)  # too soon after the one before
        told.say("hello")
        told.finish("cell 1", RECORD | {"metrics": {"test_accuracy": 0.5, "maps": []}})
        assert [m[:2] for m in messages].count((0, "update")) == 1
        assert "maps" not in messages[-1][3]["metrics"], "no more than a line needs"
        for message in messages:
            parent.heard(*message)
        assert parent.done == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for part in "cell 0", "cell 1", "5/10", "hello", "cell 1: test accuracy 0.5000":
        assert part in shown, part


def test_a_parent_that_is_gone_stops_nothing():
    class Gone:
        def put(self, message):
            raise BrokenPipeError

    Relay(0, Gone()).begin("vit", 10)


def test_a_diverged_cell_is_described_as_such():
    record = {"status": "diverged", "wall_time_s": 1, "metrics": {"diverged_at": 7}}
    assert describe("x", record) == "x: diverged at update 7 (1 s)"
