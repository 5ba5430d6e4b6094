"""Live progress: cells done, steps per second, loss, time left.

On a terminal a rich display is redrawn in place; elsewhere one line is printed for
each finished cell and nothing between. Workers tell their parent, which draws one
display for all.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def describe(label: str, record: Record) -> str:
    """One line about a finished cell.

    >>> describe("vit n=10", {"status": "diverged", "wall_time_s": 2.0,
    ...          "metrics": {"diverged_at": 50}})
    'vit n=10: diverged at update 50 (2 s)'
    """
    metrics, seconds = record["metrics"], record["wall_time_s"]
    if record["status"] == "failed":
        error = str(metrics["error"]).split("\n")[0]
        return f"{label}: failed, {error} ({seconds:.0f} s)"
    if record["status"] == "diverged":
        return f"{label}: diverged at update {metrics['diverged_at']} ({seconds:.0f} s)"
    scores = [
        f"{name.replace('_', ' ')} {metrics[name]:.4f}"
        for name in _scores(metrics)
        if metrics.get(name) is not None
    ]
    return f"{label}: {', '.join(scores) or 'done'} ({seconds:.0f} s)"


# What a task is scored by, the first that a record has; "ap" average precision, "bits"
# of a pixel.
_KINDS = ("accuracy", "ap", "rmse", "bits", "error", "loss")


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the score of a record, on each part that it was measured on.

    A baseline may have one for every N: "test_accuracy_1000".
    """
    for kind in _KINDS:
        whole = [f"{part}_{kind}" for part in ("val", "test", "train")]
        found = [name for name in whole if name in metrics]
        if not found:
            sized = re.compile(rf"(val|test)_{kind}_\d+")
            found = [name for name in metrics if sized.fullmatch(name)]
        if found:
            return found
    return []


class Progress:
    """Progress of a run, of the cells of this process and of its workers.

    Args:
      total: number of cells it knows of; finished ones count.
      done: how many of them were finished before.
      live: draw on the terminal; None asks whether stdout is one.
    """

    def __init__(self, total: int, done: int = 0, *, live: bool | None = None):
        self.total, self.done = total, done
        terminal = sys.stdout.isatty() if live is None else live
        self._display = Display(total) if terminal else None
        # What each worker is at; 0 is also this process, where it works itself.
        self._status: dict[int, dict[str, Any]] = {}
        self._began: dict[int, tuple[int, float]] = {}

    def __enter__(self) -> Progress:
        if self._display:
            self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._display:
            self._display.stop()

    def expect(self, total: int) -> None:
        """There are so many cells by now: a grid may grow."""
        self.total = total
        if self._display:
            self._display.total = total

    def heard(self, worker: int, method: str, *arguments: Any) -> None:
        """Takes over what a worker's `Relay` said."""
        if method == "say":
            self.say(*arguments)
        else:
            getattr(self, method)(*arguments, worker=worker)

    def begin(self, label: str, updates: int, step: int = 0, worker: int = 0) -> None:
        """A cell starts, or goes on from ``step``."""
        self._began[worker] = step, time.monotonic()
        self._status[worker] = dict(label=label, updates=updates, step=step)
        self._draw()

    def update(self, step: int, loss: float, worker: int = 0) -> None:
        """The cell has done ``step`` updates; ``loss`` is the latest mean."""
        start, since = self._began[worker]
        rate = (step - start) / max(time.monotonic() - since, 1e-9)
        self._status[worker] |= dict(step=step, loss=loss, rate=rate)
        self._draw()

    def finish(self, label: str, record: Record, worker: int = 0) -> None:
        """A cell is in the store."""
        self.done += 1
        self._status.pop(worker, None)
        self.say(describe(label, record))
        self._draw()

    def say(self, line: str) -> None:
        """Prints a line, above the live display where there is one."""
        if self._display:
            self._display.print(line)
        else:
            print(line, flush=True)

    def _draw(self) -> None:
        if self._display:
            self._display.draw(list(self._status.values()), self.done)


class Relay(Progress):
    """Progress of a worker: all that it hears goes to a queue, for its parent.

    Args:
      worker: number of this worker.
      messages: has ``put((worker, method, *arguments))``.
    """

    EVERY = 0.5  # seconds between two updates

    def __init__(self, worker: int, messages: Any):
        super().__init__(0, live=False)
        self._worker, self._messages, self._told = worker, messages, 0.0

    def _put(self, method: str, *arguments: Any) -> None:
        with contextlib.suppress(OSError):  # no parent is left
            self._messages.put((self._worker, method, *arguments))

    def begin(self, label: str, updates: int, step: int = 0, worker: int = 0) -> None:
        self._put("begin", label, updates, step)

    def update(self, step: int, loss: float, worker: int = 0) -> None:
        if time.monotonic() - self._told >= self.EVERY:
            self._told = time.monotonic()
            self._put("update", step, loss)

    def finish(self, label: str, record: Record, worker: int = 0) -> None:
        told = {name: record[name] for name in ("status", "wall_time_s")}
        metrics = {
            k: v for k, v in record["metrics"].items() if not isinstance(v, list)
        }
        self._put("finish", label, told | {"metrics": metrics})

    def say(self, line: str) -> None:
        self._put("say", line)


class Display:
    """A rich display of running cells and of all cells, for a terminal."""

    def __init__(self, total: int):
        from rich.live import Live

        self.total = total
        self._since: tuple[float, int] | None = None
        self._live = Live(auto_refresh=False, transient=True)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def print(self, line: str) -> None:
        self._live.console.print(line, highlight=False, markup=False)

    def draw(self, statuses: Sequence[Mapping[str, Any]], done: int) -> None:
        """Draws the running cells and the count of finished ones."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        self._since = self._since or (now, done)
        table = Table.grid(padding=(0, 2))
        partial = 0.0
        for status in statuses:
            step, updates = status.get("step", 0), status["updates"]
            partial += step / updates
            rate, loss = status.get("rate"), status.get("loss")
            table.add_row(
                Text(status["label"]),
                ProgressBar(total=updates, completed=step, width=20),
                f"{step}/{updates}",
                "" if rate is None else f"{rate:.1f} step/s",
                "" if loss is None else f"loss {loss:.4f}",
            )
        gained = done + partial - self._since[1]
        left = ""
        if gained > 0.5 and now - self._since[0] > 5:
            seconds = (now - self._since[0]) * (self.total - done - partial) / gained
            left = f", about {seconds / 60:.0f} min left"
        table.add_row(Text(f"{done} of {self.total} cells done{left}"))
        self._live.update(Group(table), refresh=True)
