"""Programs beside an experiment: what they measure goes into a file for its report."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import tyro

from attn_jax._program import Main, program
from experiments.core import optim
from experiments.core.run import ended_by
from experiments.core.store import provenance

#: The first argument of what such a program calls: where the results lie.
Folder = Annotated[pathlib.Path, tyro.conf.Positional]


def measures(
    file: str, measure: Callable[..., dict[str, Any]], *, indent: int | None = 1
) -> Main:
    """The program that writes what a function measured, with its provenance.

    Args:
      file: its name in the folder.
      measure: takes a `Folder`; its other arguments, with their defaults and what its
        docstring says of them, are the flags.
      indent: of the file; None for many numbers.
    """

    @program
    def main(argv: Sequence[str] | None = None) -> int:
        @functools.wraps(measure)
        def write(folder: pathlib.Path, **options: Any) -> int:
            began = time.monotonic()
            try:
                found = measure(folder, **options)
                found |= dict(wall_time_s=time.monotonic() - began)
                found |= dict(provenance=provenance())
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(found, indent=indent) + "\n"
                (folder / file).write_text(text, encoding="utf-8")
            except Exception as error:
                return ended_by(error)
            print(f"-> {folder / file}, which the report tells of once it is redrawn")
            return 0

        return tyro.cli(write, args=argv)

    return main


def one_core(place: int = 0) -> None:
    """Leaves this process one of its cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[place]])


def seconds_of(
    call: Callable[[], Any],
    repeats: int,
    *,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of some calls, each waited for, after one that does not count.

    Args:
      call: what is timed.
      repeats: how often.
      warm: whether a call comes before that does not count.
      clock: on one core `time.process_time` leaves out what other programs take of it.
    """
    if warm:
        jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        began = clock()
        jax.block_until_ready(call())
        found.append(clock() - began)
    return found


def median_of(
    call: Callable[[], Any],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median of them."""
    return statistics.median(seconds_of(call, repeats, clock=clock))


def repeated(loss: Callable[..., Any], state: Any, *operands: Any) -> Any:
    """A call that trains for one more step each time, on the same batch."""
    return again(jax.jit(optim.make_step(loss), donate_argnums=0), state, *operands)


def again(step: Callable[..., tuple[Any, Any]], state: Any, *operands: Any) -> Any:
    """The same with a step that was compiled already."""
    holder = [state]

    def call() -> Any:
        holder[0], metrics = step(holder[0], *operands)
        return holder[0], metrics

    return call
