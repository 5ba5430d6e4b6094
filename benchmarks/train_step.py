"""Training speed of our ViT and ResNet, against PyTorch, and shared out over cores.

The training step of the experiments (flip, label smoothing, clipping, AdamW, schedule;
uint8 batches from the host) beside PyTorch's, eager and compiled, from the same initial
parameters. All take turns on all cores; ours is timed once more with the batch split
over one host device a core. `tests/test_torch_peers.py` shows that both compute the
same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks import serve
from benchmarks.record import cores
from benchmarks.serve import NUMBERS, STEPS_PER_CALL, Call, Served, Setting
from benchmarks.timing import (
    Effort,
    Record,
    alternate,
    ratio_of,
    summarize,
    target,
    worst,
)
from benchmarks.torch_attention import AVAILABLE
from experiments.core.memory import keep_freed_memory

OURS = "ours"
SPLIT = "ours, a device a core"
FASTEST = "the faster of PyTorch's"
# A model of each kind as small as it goes, for a test of the benchmark. On two cores
# one batch is split and the other is not.
_LEAST = (
    Setting("vit", (28, 28, 1), 2, "mu", (("depth", 1),)),
    Setting("resnet", (28, 28, 1), 3, "mu", (("widths", (4,)), ("depths", (1,)))),
)


def settings(
    size: str = "mu", batches: Sequence[int] = (64,), *, smoke: bool = False
) -> list[Setting]:
    """What is measured.

    A ViT of size `mu` of 16, 49 and 64 tokens and widths 64, 128 and 192, and the
    ResNet of the experiments. Another size is measured as it is.

    Args:
      size: a name in ``attn_jax.models.SIZES[model]``.
      batches: images of one update.
      smoke: a model of each kind as small as it goes.
    """
    small, colour = (28, 28, 1), (32, 32, 3)
    shape = small if size.startswith("mu") else colour
    if smoke:
        return list(_LEAST)
    chosen = []
    for family, batch in itertools.product(("vit", "resnet"), batches):
        chosen.append(Setting(family, shape, batch, size))
        if (family, size) == ("vit", "mu"):
            for image_shape, dim, heads in ((small, 128, 4), (colour, 192, 6)):
                wide = dict(patch=4, dim=dim, num_heads=heads, mlp_dim=4 * dim)
                chosen.append(
                    Setting(family, image_shape, batch, size, tuple(wide.items()))
                )
    return chosen


def peer(
    setting: Setting, *, channels_last: bool = False, compile: bool = False
) -> Call:
    """The same updates as `serve.train`, in PyTorch."""
    from benchmarks.torch_peers import images
    from benchmarks.torch_peers.step import Recipe, TrainStep

    channels = setting.image_shape[-1]
    numbers = dict(NUMBERS)
    loss = images.ImageLoss(
        images.from_nnx(setting.build()),
        (0.5,) * channels,
        (0.25,) * channels,
        numbers.pop("label_smoothing"),
        channels_last=channels_last,
    )
    step = TrainStep(loss, Recipe(**numbers), compile=compile)
    batches = setting.batches()

    def call() -> None:
        for batch in itertools.islice(batches, STEPS_PER_CALL):
            step(*batch)

    return call


@contextlib.contextmanager
def alternatives(setting: Setting, *, compile: bool = True) -> Iterator[dict[str, Any]]:
    """Ours and PyTorch's ways to do some updates; each has been called once.

    Each call continues from the state that the one before left. A way that fails here,
    as `torch.compile` does without a C++ compiler, is left out and said so. The split
    batch has a process of its own: how many devices there are is fixed when JAX starts,
    and would change the other rows.

    Args:
      setting: model and batch size.
      compile: also `torch.compile`, which takes up to a minute.
    """
    calls: dict[str, Call] = {}
    with contextlib.ExitStack() as stack:
        number = cores()
        if jax.default_backend() == "cpu" and number > 1 and not setting.batch % number:
            asked = dataclasses.asdict(setting)
            split = Served("train", asked, JAX_NUM_CPU_DEVICES=str(number))
            calls[SPLIT] = stack.enter_context(split)  # it compiles meanwhile
        calls = {OURS: serve.train(setting)} | calls
        for call in calls.values():
            call()
        if AVAILABLE:
            calls |= _peers(setting, compile)
        yield calls


def _peers(setting: Setting, compile: bool) -> dict[str, Call]:
    import torch

    calls = {}
    for compiled, last in itertools.product(
        (False, True) if compile else (False,),
        (False, True) if setting.model == "resnet" else (False,),
    ):
        name = "torch compile" if compiled else "torch eager"
        name += " channels_last" if last else ""
        # One compiled program must not count as a recompilation of another's.
        torch.compiler.reset()
        call = peer(setting, channels_last=last, compile=compiled)
        try:
            call()
        except Exception as error:  # whatever its compiler raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} is left out: {reason}")
            continue
        calls[name] = call
    return calls


def rows_of(setting: Setting, effort: Effort) -> list[dict[str, Any]]:
    """Times a setting: milliseconds and images a second of each alternative.

    Ratios are against the faster of PyTorch's ways, which is the first row.
    """
    with alternatives(setting, compile=not effort.smoke) as calls:
        figures = alternate(calls, rounds=effort.rounds, seconds=effort.seconds)
    peers = [name for name in figures if not name.startswith(OURS)] or [OURS]
    base = min(peers, key=lambda name: statistics.median(figures[name]))
    figures = {base: figures.pop(base)} | figures
    per_step = {
        name: [value / STEPS_PER_CALL for value in values]
        for name, values in figures.items()
    }
    rows = []
    for row in summarize(per_step, base):
        milliseconds = row["milliseconds"]
        rows.append(
            dict(
                name=row["name"],
                milliseconds=milliseconds,
                images_per_second=1e3 * setting.batch / milliseconds,
                against={FASTEST: ratio_of(row)} if base != OURS else {},
            )
        )
    return rows


def group(effort: Effort) -> Record:
    """The training steps of the experiments, in JAX and in PyTorch."""
    keep_freed_memory()
    tables = []
    chosen = settings(effort.size, effort.batches, smoke=effort.smoke)
    for setting in chosen[:1] if effort.smoke else chosen:
        effort.say(f"{setting.title} ...")
        title = setting.title
        rows = rows_of(setting, effort)
        tables.append(dict(title=title, short=title, model=setting.model, rows=rows))
    return record_of(tables)


def record_of(tables: list[dict[str, Any]]) -> Record:
    """What is stored of the training steps: the tables, and the targets from them.

    A target is by the faster of our ways, as its base is the faster of PyTorch's.
    """
    targets = []
    for model, work in (
        ("vit", "ViT train step, against PyTorch eager and compile"),
        ("resnet", "CNN train step, against PyTorch eager channels_last and compile"),
    ):
        best = []
        for table in (t for t in tables if t["model"] == model):
            ways = [r for r in table["rows"] if r["name"].startswith(OURS)]
            ways = [row for row in ways if row["against"]]
            if ways:
                fastest = max(ways, key=lambda row: row["against"][FASTEST][0])
                short = f"{table['short']}, {fastest['name']}"
                best.append(dict(short=short, rows=[fastest | dict(name=OURS)]))
        targets.append(target(work, 1.0, 1.3, *worst(best, OURS, FASTEST)))
    return dict(
        title="Training steps of image models",
        about="The same model from the same initial parameters, the same update; "
        "images a second on all cores, batches from the host included. The base is "
        "the fastest of PyTorch's ways, the first row; targets take the faster of "
        "ours, which splits the batch over one host device a core or does not. Memory "
        "is left out: PyTorch's cannot be told from what its compiler takes.",
        tables=tables,
        targets=targets,
    )


def workers(effort: Effort) -> Record:
    """One training process on all cores, against one process a core."""
    base = "one process, all cores"
    tables = []
    models, batch = (("mlp",), 2) if effort.smoke else (("vit", "resnet"), 64)
    for model in models if hasattr(os, "sched_getaffinity") else ():
        effort.say(f"workers, {model} ...")
        asked = dataclasses.asdict(Setting(model, (28, 28, 1), batch))
        mine = sorted(os.sched_getaffinity(0))[: 1 if effort.smoke else None]
        ways = {base: [mine], "one process a core": [[core] for core in mine]}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        with contextlib.ExitStack() as stack:
            served = {
                name: [
                    stack.enter_context(Served("train", asked, cores=share))
                    for share in shares
                ]
                for name, shares in ways.items()
            }
            for processes in served.values():
                for process in processes:  # each has compiled before any is timed
                    process()
            for _ in range(min(effort.rounds, 3)):
                for name, processes in served.items():
                    for process in processes:
                        process.start(0.0 if effort.smoke else 4.0)
                    speeds[name].append(
                        sum(batch * STEPS_PER_CALL * p.finish() for p in processes)
                    )
        rows = []
        for name, values in speeds.items():
            ratios = [v / b for v, b in zip(values, speeds[base], strict=True)]
            spread = [statistics.median_high(ratios), min(ratios), max(ratios)]
            speed = statistics.median_high(values)
            rows.append(
                dict(name=name, images_per_second=speed, against={base: spread})
            )
        title = f"{model} of size mu, batch {batch}"
        tables.append(dict(title=title, short=model, rows=rows))
    return dict(
        title="Workers",
        about="Several cells of an experiment on one machine: one process that uses "
        "all cores, or one process a core. Images a second, all processes together.",
        tables=tables,
        targets=[],
    )
