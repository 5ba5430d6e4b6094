"""What "attention is parallel, the RNN is not" means: what must wait, over the length.

`python -m experiments.attention_vs_rnn.parallel FOLDER` writes parallel.json, which the
report reads: for decoders that differ in what mixes tokens, the longest chain of
dependent operations of a forward pass and of a train step, over the length T, and how
often the loops of XLA's compiled program turn; and the seconds of a train step with the
batch, or the tokens of one long sequence, split over 1, 2, 4 and 8 devices that share
this machine's cores. Chains are counted, no machine changes them. Seconds are the least
of several calls, taken in turns.
"""

from __future__ import annotations

import functools
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from attn_jax import VARIANTS
from attn_jax.nn.decoder import Decoder, decoder_functions
from attn_jax.tools.chain import chain_length
from attn_jax.tools.cost import count_flops
from experiments.attention_vs_rnn.cells import LINEAR_CHUNK
from experiments.attention_vs_rnn.data import SYMBOLS
from experiments.attention_vs_rnn.speed import PARALLEL
from experiments.core import devices, optim
from experiments.core.engine import available_cores
from experiments.core.measure import Folder, measures, seconds_of

MIXERS: Mapping[str, Any] = {
    "softmax": VARIANTS["dot_product"],
    "linear": VARIANTS["linear"].bind(chunk_size=LINEAR_CHUNK),
    "linear, token by token": VARIANTS["linear"].bind(chunk_size=1),
    "lstm": "lstm",
}
"""What is compared; softmax attention without blocks, which are there for memory."""

SIZES = dict(dim=64, depth=2, num_heads=4)
SMALL_SIZES = dict(dim=8, depth=1, num_heads=2)


class Programs(NamedTuple):
    """A forward pass and a train step, and their operands."""

    forward: Callable[..., jax.Array]
    step: Callable[..., Any]
    state: Any
    batch: tuple[np.ndarray, np.ndarray]  # symbols, and those that follow: [B, T] each
    rng: jax.Array


def programs_of(
    mixer: str, sizes: Mapping[str, Any], batch: int, length: int
) -> Programs:
    """Those of a decoder of symbols; no time depends on which they are."""
    decoder = Decoder(
        SYMBOLS + 1,
        SYMBOLS + 1,
        mixer=MIXERS[mixer],
        max_length=length,
        **sizes,
        rngs=nnx.Rngs(0),
    )
    functions, params = decoder_functions(decoder)

    def loss(params: Any, batch: Any, rng: jax.Array, hyper: Any) -> Any:
        symbols, wanted = batch
        logits = functions.apply(params, symbols)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return losses.mean(), {}

    numbers = dict(learning_rate=1e-3, weight_decay=0.01, clip_norm=1)
    hyper = optim.recipe(**numbers, warmup=10, updates=100)
    symbols = np.ones((batch, length), np.int32)
    return Programs(
        functions.apply,
        optim.make_step(loss),
        optim.init_state(params, hyper),
        (symbols, symbols),
        jax.random.key(0),
    )


# -------------------------------------------------------------------- chains

_NAMED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def loop_turns(hlo: str) -> int:
    r"""How often the loops of a compiled program turn, one after the other.

    A loop inside of another counts as often as that one turns; one of unknown length
    counts once.

    >>> loop_turns('''
    ... %body (x: f32[]) -> f32[] {
    ... }
    ... ENTRY %main (x: f32[]) -> f32[] {
    ...   %w = f32[] while(%x), body=%body, config={"known_trip_count":{"n":"7"}}
    ... }''')
    7
    """
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = name if line.startswith("ENTRY ") else entry
        lines.setdefault(name, []).append(line)

    def turns(name: str) -> int:
        total = 0
        for line in lines.get(name, ()):
            inner = sum(map(turns, _NAMED.findall(line)))
            if " while(" in line:
                found = _TURNS.search(line)
                inner = (int(found[1]) if found else 1) * max(1, inner)
            total += inner
        return total

    return turns(entry)


def chains(
    lengths: Sequence[int], sizes: Mapping[str, Any], compiled: Sequence[int]
) -> list[dict[str, Any]]:
    """The chain of every model and length, forward and of a train step.

    Args:
      lengths: T.
      sizes: of the decoders.
      compiled: of these lengths programs are compiled too, for their loops.
    """
    rows = []
    for model in MIXERS:
        for length in lengths:
            made = programs_of(model, sizes, 1, length)
            programs = {
                "forward": (made.forward, (made.state.params, made.batch[0])),
                "train step": (made.step, (made.state, made.batch, made.rng)),
            }
            for program, (fn, operands) in programs.items():
                row = dict(model=model, length=length, program=program)
                row |= chain_length(fn, *operands)._asdict()
                row["flops"] = count_flops(fn, *operands).total
                if length in compiled:
                    text = jax.jit(fn).lower(*operands).compile().as_text()
                    row["loop_turns"] = loop_turns(text or "")
                rows.append(row)
            print(f"{model} T={length:,}: {rows[-1]['operations']:,}", flush=True)
    return rows


# ------------------------------------------------------------------- devices


def split_steps(
    split: str,
    models: Sequence[str],
    counts: Sequence[int],
    sizes: Mapping[str, Any],
    batch: int,
    length: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Seconds of a train step whose batch or tokens are split over devices.

    Args:
      split: "batch" or "tokens".
      models: of `MIXERS`.
      counts: numbers of devices.
      sizes: of the decoders.
      batch: sequences in all.
      length: T.
      repeats: calls of each, in turns, after one that does not count.
    """
    axes = ("data", None) if split == "batch" else (None, "data")
    calls: list[Callable[[], Any]] = []
    rows: list[dict[str, Any]] = []
    for model in models:
        made = programs_of(model, sizes, batch, length)
        for count in counts:
            mesh = devices.data_mesh(jax.devices()[:count])
            operands = (
                devices.put(made.state, mesh),
                devices.put(made.batch, mesh, *axes),
                devices.put(made.rng, mesh),
            )
            compiled = jax.jit(made.step).lower(*operands).compile()
            calls.append(functools.partial(compiled, *operands))
            row: dict[str, Any] = dict(split=split, model=model, devices=count)
            row |= dict(batch=batch, length=length, seconds=[])
            row["loop_turns"] = loop_turns(compiled.as_text() or "")
            # By XLA, which takes the body of a loop once: to compare one with many.
            row["device_flops"] = (compiled.cost_analysis() or {}).get("flops")
            rows.append(row)
    for turn in range(repeats):
        for row, call in zip(rows, calls, strict=True):
            row["seconds"] += seconds_of(call, 1, warm=turn == 0)
    for row in rows:
        least = min(row["seconds"])
        print(f"{row['model']}, {split} over {row['devices']}: {least:.4f} s")
    return rows


# --------------------------------------------------------------------- main


def measure(
    folder: Folder = pathlib.Path("runs/attention_vs_rnn/cpu"), *, smoke: bool = False
) -> dict[str, Any]:
    """Counts chains of dependent operations, and times steps on several devices.

    Args:
      folder: of the results.
      smoke: tiny sizes, as a test of the program.
    """
    if not smoke:  # before anything runs: 8 devices that share the cores
        jax.config.update("jax_num_cpu_devices", 8)
    sizes = SMALL_SIZES if smoke else SIZES
    powers = range(3, 6) if smoke else range(5, 12)
    counts = [1] if smoke else [1, 2, 4, 8]
    models = ("softmax", "linear", "lstm")
    shapes = dict(batch=(2, 8), tokens=(1, 8))
    if not smoke:
        shapes = dict(batch=(8, 512), tokens=(1, 2048))
    rows = []
    for split, (batch, length) in shapes.items():
        repeats = 1 if smoke else 15
        rows += split_steps(split, models, counts, sizes, batch, length, repeats)
    return dict(
        sizes=sizes,
        chunk=LINEAR_CHUNK,
        chains=chains([2**power for power in powers], sizes, (64, 1024)),
        devices=rows,
        cores=len(available_cores()),
    )


main = measures(PARALLEL, measure)

if __name__ == "__main__":
    sys.exit(main())
