from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from experiments.core import observe as progress
from experiments.core.observe import Display, Progress, describe, read_statuses

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


def test_a_worker_tells_its_parent_through_a_file(tmp_path, capsys):
    file = tmp_path / "worker-0.status"
    with Progress(3, status_file=file) as told:
        told.begin("vit", 10)
        assert list(read_statuses([file])) == [dict(label="vit", updates=10, step=0)]
        told.finish("vit", RECORD)
        assert list(read_statuses([file, tmp_path / "none"])) == []
        file.write_text("{")
        assert list(read_statuses([file])) == []
    assert list(tmp_path.iterdir()) == []
    assert "vit: test accuracy" in capsys.readouterr().out


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path):
    drive(status_file=tmp_path / "gone" / "worker-0.status")


def test_a_diverged_cell_is_described_as_such():
    record = {"status": "diverged", "wall_time_s": 1, "metrics": {"diverged_at": 7}}
    assert describe("x", record) == "x: diverged at update 7 (1 s)"
