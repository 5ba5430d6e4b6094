"""Layers beside their peers: attention exact, long, truncated; group normalisation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attn_jax
from attn_jax.models import GroupNorm
from attn_jax.tools import bench as benchmarking
from attn_jax.tools.bench import Direction, Program
from benchmarks import torch_attention
from benchmarks.timing import Effort, Record, compare, target, worst

DIRECTIONS: tuple[Direction, ...] = ("forward", "forward + backward")
HEADS, HEAD_DIM = 8, 64
# Beyond this T the dense forms take seconds a call: fewer of them, and fewer rounds.
MUCH = 2048
TORCH = "torch SDPA"
OURS = "ours, default"


def _arrays(shape: Sequence[int], number: int = 4) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), number)
    return [jax.random.normal(key, tuple(shape)) for key in keys]


def _kinds(effort: Effort) -> list[tuple[Direction, bool, str]]:
    """Direction, whether causal, and both in words."""
    return [
        (direction, causal, direction + ", causal" * causal)
        for causal in ((False,) if effort.smoke else (False, True))
        for direction in DIRECTIONS
    ]


def _programs(
    functions: Mapping[str, Callable[..., jax.Array]],
    arrays: Sequence[Any],
    backward: bool,
) -> dict[str, Program]:
    """Compiles forward, or forward and backward, of each function."""
    return {
        name: benchmarking.attention(fn, *arrays, backward=backward)
        for name, fn in functions.items()
    }


def _check_equal(outputs: Mapping[str, Any]) -> None:
    """Raises unless all alternatives computed the same [B, T, N, H]."""
    (base, expected), *others = outputs.items()
    for name, out in others:
        np.testing.assert_allclose(
            out, expected, rtol=1e-3, atol=1e-4, err_msg=f"{name} is not {base}"
        )


def _first(result: Any) -> Any:
    """The output of a call that may return (output, gradients)."""
    return result[0] if isinstance(result, tuple) else result


def exact(effort: Effort) -> Record:
    """Exact attention on whole arrays, against `jax.nn` and PyTorch."""
    tokens, lengths = (32, (16,)) if effort.smoke else (4096, (256, 1024, 4096))
    cases = list(itertools.product(_kinds(effort), lengths))
    torch_peaks: list[int | None] = [None] * len(cases)
    if torch_attention.AVAILABLE:
        torch_peaks = torch_attention.peak_bytes(
            [
                dict(
                    shape=[tokens // length, HEADS, length, HEAD_DIM],
                    backward=direction != "forward",
                    causal=causal,
                )
                for (direction, causal, _), length in cases
            ]
        )
    tables = []
    for case, torch_peak in zip(cases, torch_peaks, strict=True):
        (direction, causal, kind), length = case
        backward, batch = direction != "forward", tokens // length
        effort.say(f"exact attention, {kind}, T = {length:,} ...")
        calls = _exact_calls((batch, length, HEADS, HEAD_DIM), causal, backward)
        # Two products forward, four more backward; half of the pairs where causal.
        pairs = length * (length + 1) / 2 if causal else length**2
        gflop = (6 if backward else 2) * 2e-9 * batch * HEADS * pairs * HEAD_DIM
        rows = compare(
            calls,
            ("jax.nn", TORCH),
            effort.at_most(5) if length > MUCH else effort,  # seconds a call
            gflop=gflop,
            peak_bytes={TORCH: torch_peak},
        )
        title = (
            f"{kind}, T = {length:,}, {tokens:,} tokens, {HEADS} heads of {HEAD_DIM}"
        )
        tables.append(dict(title=title, short=f"T = {length:,}", kind=kind, rows=rows))
    targets = []
    for base, peer, least, aims in (
        (TORCH, "PyTorch", 1.0, (1.1, 1.3)),
        ("jax.nn", "jax.nn", 3.0, (5.0, 5.0)),
    ):
        for direction, aim in zip(DIRECTIONS, aims, strict=True):
            found = [table for table in tables if table["kind"] == direction]
            what = f"exact attention {direction}, against {peer}"
            targets.append(target(what, least, aim, *worst(found, OURS, base)))
    return dict(
        title="Exact attention",
        about="All alternatives get the same numbers and are checked to return the "
        "same. PyTorch gets arrays in [B, N, T, H] order, in which it is fastest; the "
        "others get [B, T, N, H]. GF/s counts the products that have to be (two "
        "forward, four more backward; half of the pairs where causal), for all "
        "alternatives alike, not what a program recomputes. Beyond "
        f"T = {MUCH:,} our dense form, and `jax.nn` where causal, are left out: they "
        "take seconds a call.",
        tables=tables,
        targets=targets,
    )


def _exact_functions(causal: bool) -> dict[str, Callable[..., jax.Array]]:
    """`jax.nn` and ours: what it chooses, and each implementation by name."""
    ours = functools.partial(attn_jax.dot_product_attention, is_causal=causal)
    return {
        "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=causal),
        OURS: ours,
        "ours, reference": functools.partial(ours, implementation="reference"),
        "ours, blockwise": functools.partial(ours, implementation="blockwise"),
    }


def _exact_calls(shape: Sequence[int], causal: bool, backward: bool) -> dict[str, Any]:
    """The alternatives, checked to compute the same."""
    q, k, v, _ = arrays = _arrays(shape)
    functions = _exact_functions(causal)
    if shape[1] > MUCH:
        del functions["ours, reference"]
        if causal:
            del functions["jax.nn"]
    calls: dict[str, Any] = _programs(functions, (q, k, v), backward)
    outputs = {name: _first(made.call()) for name, made in calls.items()}
    if torch_attention.AVAILABLE:
        given = torch_attention.tensors(
            [np.asarray(x) for x in (arrays if backward else arrays[:3])]
        )
        calls[TORCH] = torch_attention.call(given, backward=backward, causal=causal)
        outputs[TORCH] = np.asarray(_first(calls[TORCH]())).transpose(0, 2, 1, 3)
    _check_equal(outputs)
    return calls


def memory(effort: Effort) -> Record:
    """Temporary memory of long sequences; compiled, never run."""
    length = 64 if effort.smoke else 16_384
    array = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32)
    tables: list[dict[str, Any]] = []
    ratios: list[tuple[str, float]] = []
    for direction, causal, kind in sorted(_kinds(effort)):
        effort.say(f"memory, {kind}, T = {length:,} ...")
        made = _programs(_exact_functions(causal), (array,) * 3, direction != "forward")
        rows: list[dict[str, Any]] = []
        dense = made["jax.nn"].temp_bytes
        for name, one in made.items():
            rows.append(
                dict(name=name, temp_bytes=one.temp_bytes, peak_bytes=one.peak_bytes)
            )
            if dense is not None and one.temp_bytes is not None:
                rows[-1]["memory_ratio"] = dense / max(one.temp_bytes, 1)
        ratios += [
            (kind, row["memory_ratio"])
            for row in rows
            if row["name"] == OURS and "memory_ratio" in row
        ]
        tables.append(dict(title=f"{kind}, T = {length:,}", short=kind, rows=rows))
    return dict(
        title="Memory of long sequences",
        about=f"One example of {HEADS} heads of {HEAD_DIM}. Temporary memory as XLA "
        "plans it for the compiled program; nothing is run, since the dense form "
        "would not fit everywhere.",
        tables=tables,
        targets=[
            target(
                f"temporary memory at T = {length:,}, dense over ours",
                32.0,
                100.0,
                min((ratio for _, ratio in ratios), default=None),
                ", ".join(f"{kind}: {ratio:.0f}" for kind, ratio in ratios),
            )
        ],
    )


def layer(effort: Effort) -> Record:
    """Flax's multi-head layer, with its own attention function and with ours."""
    width, tokens = (32, 64) if effort.smoke else (HEADS * HEAD_DIM, 4096)
    functions: dict[str, dict[str, Any]] = {
        "flax, its own": {},
        "flax, ours": dict(
            attention_fn=attn_jax.as_attention_fn("dot_product", implementation="auto")
        ),
        "flax, blockwise": dict(attention_fn=attn_jax.as_attention_fn("blockwise")),
    }
    tables = []
    for length in (16,) if effort.smoke else (64, 256, 1024):
        (x,) = _arrays((tokens // length, length, width), 1)
        for gradient in (False, True):
            what = "gradient" if gradient else "forward"
            effort.say(f"attention layer, {what}, T = {length:,} ...")
            calls = {}
            for name, options in functions.items():
                module = nnx.MultiHeadAttention(
                    num_heads=HEADS,
                    in_features=width,
                    decode=False,
                    rngs=nnx.Rngs(0),
                    **options,
                )
                calls[name] = _layer_program(module, x, gradient)
            _check_equal({name: made.call()[0] for name, made in calls.items()})
            tables.append(
                dict(
                    title=f"{what}, T = {length:,}, {tokens:,} tokens, width {width}",
                    short=f"T = {length:,}, {what}",
                    rows=compare(calls, ("flax, its own",), effort),
                )
            )
    return dict(
        title="Attention layer",
        about="`flax.nnx.MultiHeadAttention` with the same parameters: with its own "
        'attention function, with `as_attention_fn("dot_product", '
        'implementation="auto")` and with `as_attention_fn("blockwise")`. Gradient: of '
        "the output's squares, for parameters and input, forward pass included.",
        tables=tables,
        targets=[],
    )


def _layer_program(module: nnx.Module, x: jax.Array, gradient: bool) -> Program:
    """Output of a layer, or output and gradients."""
    graphdef, state = nnx.split(module)

    def forward(state: Any, x: jax.Array) -> Any:
        return (nnx.merge(graphdef, state)(x),)

    def loss(state: Any, x: jax.Array) -> Any:
        (out,) = forward(state, x)
        return jnp.sum(jnp.square(out)), out

    def both(state: Any, x: jax.Array) -> Any:
        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, x)
        return out, gradients

    return benchmarking.program(both if gradient else forward, state, x)


def truncated(effort: Effort) -> Record:
    """Windows of 128 keys in a long sequence, against exact attention to all."""
    length, heads, window = (64, 2, 8) if effort.smoke else (8192, 4, 128)
    around = (window // 2, window // 2)
    before = (window - 1, 0)

    def dense(causal: bool) -> Callable[..., jax.Array]:
        return functools.partial(
            attn_jax.dot_product_attention,
            implementation="blockwise",
            is_causal=causal,
        )

    def band(name: str, sides: tuple[int, int]) -> Callable[..., jax.Array]:
        if name == "truncated":
            lifted = attn_jax.multi_head(name)
            return functools.partial(lifted, left=sides[0], right=sides[1])
        return functools.partial(
            attn_jax.dot_product_attention,
            implementation="blockwise",
            local_window_size=sides,
        )

    functions = {
        "all keys": dense(False),
        "all keys, causal": dense(True),
        f"truncated, {around[0]} + {around[1]}": band("truncated", around),
        f"truncated, {before[0]} + 0": band("truncated", before),
        f"blockwise, {around[0]} + {around[1]}": band("blockwise", around),
        f"blockwise, {before[0]} + 0": band("blockwise", before),
    }
    arrays = _arrays((1, length, heads, HEAD_DIM), 3)
    tables = []
    for direction in DIRECTIONS:
        effort.say(f"truncated attention, {direction}, T = {length:,} ...")
        calls = _programs(functions, arrays, direction != "forward")
        outputs = {name: _first(made.call()) for name, made in calls.items()}
        for sides in (around, before):
            ending = f"{sides[0]} + {sides[1]}"
            _check_equal({n: out for n, out in outputs.items() if n.endswith(ending)})
        tables.append(
            dict(
                title=f"{direction}, T = {length:,}, {heads} heads of {HEAD_DIM}",
                short=direction,
                rows=compare(calls, ("all keys", "all keys, causal"), effort),
            )
        )
    # Dense is attention to all keys; a window before each query is also told against
    # the dense causal form, which does half of that work.
    names = [f"{sides[0]} + {sides[1]}" for sides in (around, before)]
    found = [worst(tables, f"truncated, {name}", "all keys") for name in names]
    reached = min((ratio for ratio, _ in found if ratio is not None), default=None)
    _, causal = worst(tables, f"truncated, {names[1]}", "all keys, causal")
    told = "; ".join(
        f"{name}: {text}" for name, (_, text) in zip(names, found, strict=True)
    )
    told += f"; {names[1]} against dense causal: {causal}"
    return dict(
        title="Truncated attention",
        about=f"A window of {window} keys: before and after each query, or the query "
        "and those before it. The base is our own exact blockwise attention to all "
        "keys, and to all keys before.",
        tables=tables,
        targets=[
            target(
                f"truncated attention, T = {length:,}, window {window}, against "
                "dense blockwise",
                10.0,
                25.0,
                reached,
                told,
            )
        ],
    )


def group_norm(effort: Effort) -> Record:
    """Groups of 4 channels, at two shapes of the experiments' ResNet."""
    batch = 2 if effort.smoke else 64
    tables = []
    for side, channels in ((14, 20), (7, 40)):
        shape = (batch, side, side, channels)
        effort.say(f"group normalisation, {list(shape)} ...")
        (x,) = _arrays(shape, 1)
        groups = channels // 4
        modules: dict[str, nnx.Module] = {
            "flax": nnx.GroupNorm(
                channels, num_groups=groups, epsilon=1e-5, rngs=nnx.Rngs(0)
            ),
            "ours": GroupNorm(channels, num_groups=groups),
        }
        calls = {name: _layer_program(m, x, True) for name, m in modules.items()}
        rows = compare(calls, ("flax",), effort)
        tables.append(dict(title=f"{list(shape)}", short=str(side), rows=rows))
    return dict(
        title="Group normalisation",
        about="Gradient for parameters and input, forward pass included, beside "
        "`flax.nnx.GroupNorm`.",
        tables=tables,
        targets=[],
    )
