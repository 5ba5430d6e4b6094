"""Asking a run to stop: signals, and what they interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came; the run in progress is saved."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name


class Stop:
    """A request to stop, which whoever works asks for between two steps."""

    def __init__(self) -> None:
        self._signum: int | None = None

    @property
    def signum(self) -> int | None:
        """The signal that came last, or None."""
        return self._signum

    def ask(self, signum: int) -> None:
        """Makes the request."""
        self._signum = signum

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A request need not be asked for here, where it can be told otherwise.

        Raises:
          Interrupted: it came.
        """
        if self.signum is not None:
            raise Interrupted(self.signum)
        yield


class StopSignal(Stop):
    """Turns SIGTERM and SIGINT into a request while the context lasts.

    A signal that follows within `GRACE` seconds is the same request once more: who
    signals a whole process group reaches a worker twice, directly and by its parent.
    A later one acts as usual, so that a hung run can be ended.

    Args:
      parent: process whose end counts as SIGTERM, so that a worker does not outlive
        a run that was killed; None watches nobody.
    """

    GRACE = 2.0

    def __init__(self, parent: int | None = None) -> None:
        super().__init__()
        self._since = 0.0
        self._parent = parent
        self._before: dict[int, Any] = {}
        self._raises = False

    @property
    def signum(self) -> int | None:
        if self._signum is None and self._parent is not None:
            if os.getppid() != self._parent:
                self._signum = signal.SIGTERM
        return self._signum

    def _handle(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self._signum is None:
            self._signum, self._since = signum, now
            if self._raises:
                raise Interrupted(signum)
        elif now - self._since > self.GRACE:
            self._restore(signum)
            signal.raise_signal(signum)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        with super().at_once():
            self._raises = True
            try:
                yield
            finally:
                self._raises = False

    def _restore(self, signum: int) -> None:
        handler = self._before[signum]  # None: it was not set from Python
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.getsignal(signum)
            signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum in self._before:
            self._restore(signum)


def interruptible(function: Callable[[], Result], stop: Stop) -> Result:
    """Calls a function of minutes that a signal may end, also one that runs in C.

    It runs in a thread. What is left of it after a signal is given up with the process.

    Raises:
      Interrupted: a signal came.
    """
    found: list[Result] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if stop.signum is not None and thread.is_alive():
            raise Interrupted(stop.signum)
    if failed:
        raise failed[0]
    return found[0]
