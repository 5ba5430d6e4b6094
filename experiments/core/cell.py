"""What is run (`Settings`, `Cell`) and how (`Runtime`), with limits on the fields.

Settings are what an experiment plans by. A cell is one training run and everything that
can change its numbers; its hash names its result file. A runtime is where and how fast,
and changes no number beyond rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import tyro

from attn_jax.variant import Variant, resolve
from experiments.core.identity import Differs, with_differs


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a field may hold: as a check, and in words, which ``--help`` shows too."""

    holds: Callable[[Any], bool]
    words: str


def at_least(low: float) -> Limit:
    """Numbers from ``low`` on; of a tuple, every one.

    >>> at_least(1).holds((1, 2)), at_least(1).holds(0), at_least(1).words
    (True, False, 'at least 1')
    """

    def holds(value: Any) -> bool:
        many = value if isinstance(value, tuple) else (value,)
        return all(x is None or low <= x < math.inf for x in many)

    return Limit(holds, f"{low} or more" if low == 0 else f"at least {low}")


def some_of(known: Iterable[str], *, least: int = 1) -> Limit:
    """A tuple of names, each once, ``least`` of them or more.

    >>> some_of("ab").holds(("a",)), some_of("ab").holds(("c",)), some_of("ab").words
    (True, False, 'some of a, b')
    """
    known = tuple(known)

    def holds(value: tuple[str, ...]) -> bool:
        return least <= len(value) == len(set(value)) and set(value) <= set(known)

    return Limit(holds, f"some of {', '.join(known)}")


def one_of(known: Iterable[str]) -> Limit:
    """One of some names."""
    known = tuple(known)
    return Limit(lambda value: value in known, f"one of {', '.join(known)}")


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Above = Annotated[float, Limit(lambda x: 0 < x < math.inf, "above 0, finite")]
Amount = Annotated[float, Limit(lambda x: 0 <= x < math.inf, "0 or more, finite")]
Share = Annotated[float, Limit(lambda x: 0 <= x < 1, "in [0, 1)")]
Clip = Annotated[float, Limit(lambda x: x > 0, "above 0 (inf = no clipping)")]
Counts = Annotated[
    tuple[int, ...],
    Limit(
        lambda x: bool(x) and min(x) >= 1 and len(set(x)) == len(x),
        "at least one number, all >= 1, without repetition",
    ),
]
Rates = Annotated[
    tuple[float, ...],
    Limit(lambda x: bool(x) and min(x) > 0, "at least one number, all above 0"),
]
Dtype = Annotated[Literal["float32", "bfloat16"], one_of(("float32", "bfloat16"))]

# (field, whether its value may stand, what would be right)
Rule = tuple[str, bool, str]


@functools.cache
def _limits(kind: Any) -> tuple[tuple[str, Limit], ...]:
    """The limits on the fields of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(
        (field.name, item)
        for field in dataclasses.fields(kind)
        for item in getattr(hints[field.name], "__metadata__", ())
        if isinstance(item, Limit)
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """A frozen dataclass whose fields have limits, ``Annotated[type, Limit]``.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Toy(Settings):
    ...     seeds: Count = 3
    >>> Toy(seeds=0)
    Traceback (most recent call last):
      ...
    ValueError: seeds must be at least 1, got 0.
    """

    def rules(self) -> Iterator[Rule]:
        """What a limit on one field cannot say: (field, holds, what would be right)."""
        return iter(())

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, limit in _limits(kind):
            _demand(self, name, limit.holds(getattr(self, name)), limit.words)
        for rule in self.rules():
            _demand(self, *rule)


def _demand(settings: Any, name: str, ok: bool, expected: str) -> None:
    if not ok:
        value = getattr(settings, name)
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


@functools.cache
def with_limits_shown(kind: Any) -> Any:
    """The dataclass, its limits made part of what ``--help`` shows of a field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, limit in _limits(kind):
        shown = tyro.conf.arg(metavar=f"<{limit.words}>")
        hints[name] = Annotated[hints[name], shown]
    kind.__annotations__ = {
        field.name: hints[field.name] for field in dataclasses.fields(kind)
    }
    return kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Settings):
    """One training run: what every experiment's cells have.

    Attributes:
      task: name of the data.
      model: which model, the row of a table.
      seed: draws the initial parameters and all that is random in training.
      updates: number of optimiser steps.
      phase: "tune" is scored on the validation part; "final" on the test part, once.
      learning_rate: peak of the schedule.
      weight_decay: of AdamW, on what has two axes or more.
      warmup: share of the updates that warm up.
      clip_norm: largest global norm of a gradient.
      differs: what of the data is not as committed records had it, see
        `experiments.core.identity`.
    """

    task: str
    model: str
    seed: Natural
    updates: Count
    phase: Annotated[Literal["tune", "final"], one_of(("tune", "final"))] = "final"
    learning_rate: Above = 1e-3
    weight_decay: Amount = 0.05
    warmup: Share = 0.1
    clip_norm: Clip = 1.0
    differs: Differs = ()

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary, which the results store hashes."""
        found = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        return with_differs(found, found.pop("differs"))

    def traits(self) -> Iterator[Any]:
        """What a progress line tells besides task, model, seed and phase."""
        return iter(())

    @property
    def label(self) -> str:
        """A short name for progress lines; of a tuning cell, also what it tries."""
        tried = f" ({', '.join(self.tries())})" if self.phase == "tune" else ""
        parts = [self.task, self.model, *self.traits(), f"seed={self.seed}"]
        return " ".join(map(str, parts)) + f" {self.phase}{tried}"

    def tries(self) -> Iterator[str]:
        """The hyper-parameters of a tuning cell, in words."""
        yield f"learning rate {self.learning_rate:g}"


class EditedError(ValueError):
    """The file of an attention variant is not what it was when the run began."""


def attention_digest(attention: str | None) -> str | None:
    """SHA-256 of the file that ``"path/file.py:function"`` names, else None."""
    if attention is None or ".py:" not in attention:
        return None
    path = pathlib.Path(attention.rpartition(":")[0]).expanduser()
    if not path.is_file():
        raise ValueError(f"attention: no such file: {path} (from {attention!r}).")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.lru_cache(maxsize=64)
def variant_of(attention: str, digest: str | None) -> Variant:
    """The variant as its file was when the run began, however it is edited later.

    Raises:
      EditedError: the file was edited between planning and now.
    """
    variant = resolve(attention)
    if attention_digest(attention) != digest:
        raise EditedError(
            f"attention: the file of {attention!r} was edited since the run began; "
            "run the same command again."
        )
    return variant


@dataclasses.dataclass(frozen=True)
class Runtime(Settings):
    """Where and how cells run; no number depends on it beyond rounding."""

    out: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the results; by default one named after the preset."""
    shard: str = "1/1"
    """Which part of the cells this process takes, "i/n": one machine each."""
    engine: Literal["auto", "inline", "processes", "ray"] = "auto"
    """What runs the cells: inline (this process), processes (of this machine), or ray
    (a cluster, named by RAY_ADDRESS, or this machine). auto: processes where workers
    are more than one."""
    workers: Natural = 0
    """Cells that run at once. 0: one a core on CPU (small models gain more from it
    than from threads), else one; on Ray, one a GPU, or one a core where there is
    none."""
    vmap_seeds: bool = False
    """Train all seeds of a cell at once, where the device has room."""
    steps_per_dispatch: Natural = 0
    """Steps that one call of the compiled program does, where the shapes of their
    batches agree. 0: 1 on CPU, else 16."""
    device_data: bool = True
    """Keep what batches are taken from on the devices; off, or where batches are made
    anew, each is sent."""
    checkpoint_seconds: Amount = 60.0
    """Seconds between checkpoints."""
    log_every: Count = 50
    """Updates between two points of a curve; each is checked for NaN."""
    tensorboard: bool = False
    """Write TensorBoard event files under OUT/tensorboard."""
    distributed: bool = False
    """Join processes of several hosts by jax.distributed before anything else. The
    cluster is detected where JAX can, else named by the next three."""
    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    """Number of processes of the cluster."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("coordinator", "num_processes", "process_id"):
            if not self.distributed and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} was given without distributed: "
                    "add --distributed, or leave it out."
                )
        if self.distributed and self.workers > 1:
            raise ValueError(
                f"workers must be 1 with --distributed, got {self.workers}: there, "
                "each process of the cluster is started by itself."
            )
        if self.engine == "inline" and self.workers > 1:
            raise ValueError(
                f"workers must be 1 with --engine inline, got {self.workers}: there, "
                "this process runs the cells."
            )
        if self.distributed and self.engine not in ("auto", "inline"):
            raise ValueError(
                f"engine must be inline with --distributed, got {self.engine!r}."
            )
