"""The training steps of all experiments on an accelerator: expected, and by the clock.

Nothing here needs one. Every step is exported for NVIDIA GPUs and TPUs, and what comes
out is looked through for what would hold a device up: calls back to the host, and
float64. Its FLOPs are counted, and the bytes that it moves are those of the program
that XLA compiles for the machine at hand. A roofline makes a prediction of both, the
longer of the time to compute and the time to move; the clock checks it where there is
an accelerator.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.export

from attn_jax.tools.cost import count_flops
from benchmarks.steps import PRESETS, Presets, Step, steps
from benchmarks.timing import Effort, Record
from experiments.core import optim, run


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a chip does at most, as its maker says.

    Attributes:
      flops: a second, of products in bfloat16 without sparsity.
      narrow: how many times as many these are as those of float32 arrays under JAX's
        default precision: TF32 on the GPU, one pass in bfloat16 on the TPU.
      bytes: a second, to and from its memory.
    """

    flops: float
    narrow: float
    bytes: float


PEAKS = {
    "H200": Peak(flops=989e12, narrow=2.0, bytes=4.8e12),
    "TPU v5e": Peak(flops=197e12, narrow=1.0, bytes=819e9),
}
"""NVIDIA's and Google's data sheets, SXM and one chip."""

STEPS = 20  # that are timed
PLATFORMS = ("cuda", "tpu")


def exported(fn: Any, given: tuple[Any, ...]) -> dict[str, Any]:
    """What a jitted function is for GPUs and TPUs, and what in it slows them.

    Returns:
      {platform: {"export_bytes", "callbacks", "float64"}}: the size of the program, how
      often it calls the host, and how many of its types are float64. What calls the
      host cannot be exported where the platform is not: then that alone is told.
    """
    found: dict[str, Any] = {}
    callbacks = str(jax.make_jaxpr(fn)(*given)).count("callback[")
    if callbacks:
        return {
            p: dict(export_bytes=0, callbacks=callbacks, float64=0) for p in PLATFORMS
        }
    for platform in PLATFORMS:
        made = jax.export.export(
            fn,
            platforms=[platform],
        )(*given)
        text = made.mlir_module()
        found[platform] = dict(
            export_bytes=len(made.mlir_module_serialized),
            callbacks=0,
            float64=text.count("xf64>") + text.count("tensor<f64>"),
        )
    return found


def seconds(peak: Peak, flops: float, moved: float, narrow: bool) -> tuple[float, str]:
    """The least time of a step by the roofline, and what binds it.

    >>> seconds(Peak(flops=100.0, narrow=2.0, bytes=10.0), 100.0, 10.0, narrow=False)
    (2.0, 'compute')
    """
    compute = flops / (peak.flops if narrow else peak.flops / peak.narrow)
    move = moved / peak.bytes
    return max(compute, move), "compute" if compute >= move else "memory"


def measured(step: Step) -> float:
    """Seconds a step by the clock, on the device at hand."""
    fn, rng = step.jitted(), jax.random.key(0)
    state = optim.init_state(step.program.initial_params(0), step.hyper)
    batch = jax.device_put(step.batch)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            state, metrics = fn(state, batch, rng)
        jax.block_until_ready((state, metrics))
        began = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = fn(state, batch, rng)
        jax.block_until_ready((state, metrics))
    return (time.perf_counter() - began) / STEPS


def row_of(step: Step, by_clock: bool) -> dict[str, Any]:
    """Costs of a step, what a roofline makes of them, and the clock."""
    fn, given = step.made()
    with jax.numpy_dtype_promotion("standard"):
        flops = count_flops(fn, *given)
        lowered = fn.lower(*given)
        compiled = lowered.compile()
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        moved = float(analysis.get("bytes accessed", 0.0))
        narrow = "bf16" in lowered.as_text()
        made = exported(fn, given)
    row: dict[str, Any] = dict(
        name=step.name,
        unit=step.unit,
        rows=step.rows,
        gflop=flops.total / 1e9,
        flops_exact=flops.exact,
        moved_bytes=moved,
        peak_bytes=memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        dtype="bfloat16" if narrow else "float32",
        exported=made,
    )
    row["roofline"] = {}
    for chip, peak in PEAKS.items():
        least, binds = seconds(peak, flops.total, moved, narrow)
        row["roofline"][chip] = dict(
            milliseconds=1e3 * least,
            rows_per_second=step.rows / least,
            steps_per_second=1 / least,
            binds=binds,
        )
    if by_clock:
        row["milliseconds"] = 1e3 * measured(step)
    return row


def group(effort: Effort) -> Record:
    """Every training step: exported for accelerators, and predicted by a roofline."""
    presets: Presets = PRESETS
    if effort.smoke:
        presets = {"offsets": tuple(run.find("offsets").smallest)}
    by_clock = jax.default_backend() != "cpu" or effort.smoke
    rows = []
    for step in steps(presets):
        effort.say(f"{step.name} ...")
        rows.append(row_of(step, by_clock))
    return dict(
        title="Training steps on accelerators: a prediction",
        about=(
            "FLOPs are counted in the program; the bytes that it moves, a loop's once, "
            "and its memory are of what XLA makes for this machine. The least time is "
            "the longer of FLOPs over the chip's peak (bfloat16, or what JAX makes of "
            "float32 there) and bytes over its memory's speed: no kernel reaches it, "
            "and small steps are held up by their launch. `python -m benchmarks --only "
            "accelerator` on such a chip times the steps beside it."
        ),
        targets=[],
        peaks={chip: dataclasses.asdict(peak) for chip, peak in PEAKS.items()},
        accelerator=rows,
    )
