"""How programs end: what every ``main`` of this repository shares."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol


class Main(Protocol):
    """``main(argv=None)`` gives the exit status."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def program(main: Callable[..., int]) -> Main:
    """Makes of a main function one that neither its output nor its reader can break.

    A sign that stdout cannot encode becomes a question mark, and a reader that has seen
    enough (``... --help | head``) is no error.

    Args:
      main: takes the arguments without the program's name, or None for those of the
        process; gives the exit status.

    >>> program(lambda argv=None: len(argv))(["a", "b"])
    2
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            try:
                return main(argv)
            finally:  # also after --help, which raises SystemExit
                sys.stdout.flush()
        except BrokenPipeError:
            silence()
            return 0

    return run


def silence() -> None:
    """Lets what is still to be written go nowhere: nobody reads stdout any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
