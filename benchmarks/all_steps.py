"""The training step of every model of the experiments beside PyTorch's.

The same parameters and the same batch; that both have the same loss and gradients, with
all chance taken out, is checked before anything is timed. Each table has a process of
its own, since how many cores a process uses is settled when it starts: one core, as
cells run by several workers, and all of them.

`python -m benchmarks.all_steps` is that process; `group` starts it.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.record import ROOT, cores
from benchmarks.steps import Presets, Step, steps
from benchmarks.timing import Effort, Record, alternate, ratio_of, summarize, target
from benchmarks.torch_attention import AVAILABLE
from experiments.attention_vs_rnn.cells import Shape
from experiments.attention_vs_rnn.data import START
from experiments.attention_vs_rnn.logistic_mixture import logistic_mixture_sample
from experiments.core import devices, optim
from experiments.core.memory import keep_freed_memory

OURS = "ours"
FASTEST = "the faster of PyTorch's"
CHECKED = 1e-3  # how far losses and norms of gradients may be apart, as a share

TIMED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "data_scaling": {
        "images": ("vit n=12500", "resnet n=12500", "hybrid n=12500"),
        "phones": (
            "attention n=7675",
            "attention:30 n=7675",
            "cnn:30 n=7675",
            "gru n=7675",
        ),
    },
    "sequence_labelling": {
        "phones": ("transformer", "transformer:32+32", "cnn", "gru", "window:5"),
        "pos": ("transformer", "window:2"),
    },
    "positions": {"cpu": ("rope",)},
    "attention_vs_rnn": {"cpu": ("softmax", "linear", "lstm")},
    "attention_as_conv": {
        "cpu": ("quadratic random n=60000", "gaussian random n=60000")
    },
    "graphs": {
        "cpu": (
            "gatv2, kinds of edges n=20000",
            "edges",
            "all pairs, bias of bonds and paths",
        )
    },
    "long_range": {"quick": ("recall_32 softmax width=64",)},
    "seq2seq": {"cpu": ("transformer",)},
    "detection": {"quick": ("detr n=4000", "centers n=4000")},
}
"""Studies by experiment and preset: each model once at the size of the results."""

SMOKE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sequence_labelling": {"smoke": ("transformer",)}
}


def chosen(
    table: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> tuple[Presets, set[str]]:
    """Presets for `steps`, and the names of the steps, of a table such as `TIMED`.

    >>> chosen({"graphs": {"cpu": ("edges",)}})
    ({'graphs': ('cpu',)}, {'graphs cpu: edges'})
    """
    presets = {name: tuple(of) for name, of in table.items()}
    names = {
        f"{name} {preset}: {study}"
        for name, of in table.items()
        for preset, studies in of.items()
        for study in studies
    }
    return presets, names


# ---------------------------------------------------------------------- a step


def weights_of(step: Step) -> Any:
    """The initial parameters and noise: none is zero, so that each has a part."""
    rng = np.random.default_rng(0)
    params = step.program.initial_params(0)
    return jax.tree.map(
        lambda p: p + 0.05 * rng.standard_normal(p.shape).astype(np.float32), params
    )


def hyper_of(step: Step) -> optim.Hyper:
    """The step's, with a learning rate that changes nothing: all calls are alike."""
    return step.hyper._replace(learning_rate=np.asarray(1e-7, np.float32))


def ours_of(step: Step, params: Any) -> Callable[[], Any]:
    """An update as the experiments do it on a CPU, the batch from the host."""
    mesh, fn = devices.data_mesh(), step.jitted()
    params = jax.tree.map(np.array, params)  # the step takes its state's memory
    state = devices.put(optim.init_state(params, hyper_of(step)), mesh)
    rng = devices.put(jax.random.key(0), mesh)

    def call() -> None:
        nonlocal state
        with jax.numpy_dtype_promotion("standard"):
            state, _ = fn(state, devices.put(step.batch, mesh), rng)
        jax.block_until_ready(state)

    return call


def peers_of(step: Step, params: Any, compile: bool) -> dict[str, Callable[[], Any]]:
    """PyTorch's ways to do the same; one that fails is left out and said so."""
    import torch

    from benchmarks.torch_peers.of_step import arrays_of, loss_of
    from benchmarks.torch_peers.step import Recipe, TrainStep

    batch, recipe = arrays_of(step), Recipe.of(hyper_of(step))
    found: dict[str, Callable[[], Any]] = {}
    for compiled in (False, True) if compile else (False,):
        for last in (False, True) if step.cell.model == "resnet" else (False,):
            name = "compile" if compiled else "eager"
            name += " channels_last" if last else ""
            torch.compiler.reset()  # or a program counts as another's recompilation
            loss = loss_of(step, params, **(dict(channels_last=True) if last else {}))
            call = functools.partial(TrainStep(loss, recipe, compile=compiled), *batch)
            try:
                call()
            except Exception as error:  # whatever its compiler raises
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{step.name}: {name} is left out: {reason}", file=sys.stderr)
                continue
            found[name] = call
    return found


def check(step: Step, params: Any) -> tuple[float, float]:
    """Loss and norm of the gradients, of ours and PyTorch's alike.

    Raises:
      AssertionError: unless they agree, and so does the number of parameters.
    """
    from benchmarks.torch_peers.of_step import arrays_of, loss_of, still
    from benchmarks.torch_peers.step import Recipe, TrainStep

    quiet = still(step)
    hyper = quiet.hyper

    def loss(params: Any, batch: Any) -> Any:
        return quiet.program.loss(params, batch, jax.random.key(0), hyper)[0]

    with jax.numpy_dtype_promotion("standard"):
        ours, grads = jax.jit(jax.value_and_grad(loss))(params, quiet.batch)
    norm = float(np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads))))
    peer = TrainStep(loss_of(quiet, params), Recipe.of(hyper))
    theirs, _ = peer.gradients(*arrays_of(quiet))
    sizes = [sum(p.numel() for p in peer.parameters)]
    sizes.append(sum(p.size for p in jax.tree.leaves(params)))
    assert sizes[0] == sizes[1], f"{step.name}: {sizes} parameters"
    for what, a, b in (("loss", ours, theirs), ("gradient", norm, peer.norm())):
        message = f"{step.name}: {what} of PyTorch and ours"
        np.testing.assert_allclose(float(b), float(a), rtol=CHECKED, err_msg=message)
    return float(ours), norm


def row_of(step: Step, effort: Effort, checks: bool) -> dict[str, Any]:
    """Milliseconds of ours and of the faster of PyTorch's, and the ratio."""
    params = weights_of(step)
    calls = {OURS: ours_of(step, params)}
    if AVAILABLE:
        if checks:
            check(step, params)
        calls |= peers_of(step, params, effort.compile)
    return told(step.name, f"{step.rows} {step.unit}", calls, effort)


def told(
    name: str, batch: str, calls: Mapping[str, Callable[[], Any]], effort: Effort
) -> dict[str, Any]:
    """Times ours and the peers in turn: a row of the table."""
    figures = alternate(calls, rounds=effort.rounds, seconds=effort.seconds)
    row: dict[str, Any] = dict(name=name, batch=batch)
    row["milliseconds"] = 1e3 * statistics.median(figures[OURS])
    peers = [peer for peer in figures if peer != OURS]
    if peers:
        base = min(peers, key=lambda peer: statistics.median(figures[peer]))
        found = {found["name"]: found for found in summarize(figures, base)}
        row["against"] = {FASTEST: ratio_of(found[OURS])}
        row |= dict(peer=base, peer_milliseconds=found[base]["milliseconds"])
    return row


def generation_of(step: Step, effort: Effort, checks: bool) -> dict[str, Any]:
    """The same for pictures that a decoder of pixels draws, token by token.

    That outputs agree is checked on a few tokens.
    """
    cell, params, count = step.cell, weights_of(step), step.rows
    functions = step.program.more["functions"]
    start = np.full((count, 1), START, np.int32)
    draw = jax.jit(
        lambda params, start, rng: functions.generate(
            params, start, cell.length, rng, logistic_mixture_sample
        )
    )
    operands = jax.device_put((params, start, jax.random.key(0)))
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: jax.block_until_ready(draw(*operands))
    }
    if AVAILABLE:
        import torch

        from benchmarks.torch_peers.of_step import decoder_of

        peer, tokens = decoder_of(Shape.of(cell), params), np.arange(12).reshape(2, 6)
        if checks:
            found = peer.stepwise(torch.tensor(tokens)).numpy()
            expected = jax.jit(functions.apply)(params, tokens)
            np.testing.assert_allclose(found, expected, rtol=CHECKED, atol=CHECKED)
        first = torch.full((count,), START)
        calls["eager"] = lambda: peer.generate(first, cell.length)
    name = f"{step.name}, drawing {count} images"
    return told(name, f"{count} images", calls, effort)


def rows_of(effort: Effort, checks: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a table, in this process; one table of several has the checks."""
    keep_freed_memory()
    presets, names = chosen(SMOKE if effort.smoke else TIMED)
    missing = set(names)
    for step in steps(presets, names.__contains__):
        missing.discard(step.name)
        draws = getattr(step.cell, "components", None)
        for make in (row_of, generation_of) if draws else (row_of,):
            try:
                yield make(step, effort, checks)
            except Exception as error:  # the others are still told
                reason = f"failed: {type(error).__name__}"
                print(f"{step.name} {reason}: {error}", file=sys.stderr)
                yield dict(name=step.name, peer=reason)
    if missing:
        raise ValueError(f"TIMED must name studies that there are, got {missing}.")


# ------------------------------------------------------------------- the tables


def _served(effort: Effort, share: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of a table, by a process that has some cores."""
    asked = json.dumps([effort.rounds, effort.seconds, effort.compile, share])

    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.all_steps", asked],
        cwd=ROOT,
        env=os.environ | dict(OMP_NUM_THREADS=str(len(share))),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise RuntimeError(f"all_steps ended with status {process.returncode}")


def group(effort: Effort) -> Record:
    """The training steps of all experiments, on one core and on all."""
    effort = effort.at_most(3)
    mine = list(range(cores()))
    if hasattr(os, "sched_getaffinity"):
        mine = sorted(os.sched_getaffinity(0))
    tables = []
    for share in [mine[:1], mine] if len(mine) > 1 and not effort.smoke else [mine]:
        title = "one core" if len(share) == 1 else f"all {len(share)} cores"
        rows = []
        for row in rows_of(effort) if effort.smoke else _served(effort, share):
            effort.say(f"{title}, {row['name']}: {row.get('milliseconds', 0):.3g} ms")
            rows.append(row)
        tables.append(dict(title=title, short=title, rows=rows))
    return record_of(tables)


def record_of(tables: list[dict[str, Any]]) -> Record:
    """What is stored: the tables, and how the slowest row stands."""
    ratios = [
        (row["against"][FASTEST][0], f"{row['name']}, {table['short']}")
        for table in tables
        for row in table["rows"]
        if "against" in row
    ]
    least = min((ratio for ratio, _ in ratios), default=None)
    behind = [f"{name}: {ratio:.2f}" for ratio, name in ratios if ratio < 1]
    well = f"{len(ratios) - len(behind)} of {len(ratios)} at 1 or more"
    return dict(
        title="Training steps of all experiments",
        about="An update of every model that an experiment trains, at the size of its "
        "results: the same parameters and the same batch, from the host; loss and "
        "gradients are checked to be the same. PyTorch eager and by `torch.compile`, "
        "a ResNet in both memory layouts: the faster one is told. Decoders also draw "
        "images pixel by pixel, with a cache or a state. All take turns.",
        tables=tables,
        targets=[
            target(
                "training steps of all experiments, against the faster of PyTorch's",
                1.0,
                1.3,
                least,
                ", ".join([well, *behind]) if ratios else "",
            )
        ],
    )


def main(asked: str) -> int:
    """Prints the rows of a table, a line of JSON each."""
    rounds, seconds, compile, share = json.loads(asked)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)
    if AVAILABLE:
        import torch

        torch.set_num_threads(len(share))
    effort = Effort(rounds, seconds, compile=compile)
    for row in rows_of(effort, checks=len(share) == 1):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
