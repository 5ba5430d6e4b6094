"""What several files of tests draw, run and compare with: `from tests import helpers`.

Conftest gives some of it as fixtures too.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]

Arrays = Mapping[str, Any]


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal float32 arrays, each from a stream of its own."""
    streams = (np.random.default_rng((seed, i)) for i in itertools.count())
    return {
        name: stream.standard_normal(shape).astype(np.float32)
        for (name, shape), stream in zip(shapes.items(), streams, strict=False)
    }


def waves(shape: Sequence[int]) -> np.ndarray:
    """A cotangent that is none of the special ones, float64."""
    return np.cos(np.arange(int(np.prod(shape)))).reshape(shape)


def value_and_grads(
    fn: Callable[..., jax.Array], arrays: Arrays, cotangent: Any = None
) -> dict[str, np.ndarray]:
    """`out`, and the gradient of sum(cotangent * out) for each array, compiled."""

    def run(arrays: Arrays) -> dict[str, jax.Array]:
        out, pullback = jax.vjp(lambda arrays: fn(**arrays), arrays)
        given = waves(out.shape) if cotangent is None else cotangent
        return {"out": out, **pullback(jnp.asarray(given, out.dtype))[0]}

    return jax.jit(run)(arrays)


def same(
    ours: Callable[..., jax.Array],
    theirs: Callable[..., jax.Array],
    arrays: Arrays,
    cotangent: Any = None,
    **tolerance: float,
) -> dict[str, np.ndarray]:
    """Two functions have the same output and gradients; returns those of the first."""
    found, expected = (value_and_grads(fn, arrays, cotangent) for fn in (ours, theirs))
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], err_msg=name, **tolerance)
    return found


def agree(
    fn: Callable[..., jax.Array],
    equation: Callable[..., np.ndarray],
    arrays: Arrays,
    *,
    atol: float = 1e-5,
    slopes: float = 2e-4,
) -> dict[str, np.ndarray]:
    """Holds a function against its equation in float64, and returns what it gave.

    Args:
      fn: takes the arrays by name; so does its equation.
      equation: in float64, by loops.
      arrays: float32.
      atol: of the output.
      slopes: absolute and relative, of the derivative along a direction of each array.
    """
    found = value_and_grads(fn, arrays)
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    expected = equation(**wide)
    np.testing.assert_allclose(found["out"], expected, atol=atol, rtol=atol)
    drawn = draw({name: x.shape for name, x in wide.items()}, seed=9)
    directions = {name: np.float64(x) for name, x in drawn.items()}
    numbers = slope(equation, wide, directions, waves(expected.shape))
    for name, number in numbers.items():
        got = np.sum(np.float64(found[name]) * directions[name])
        np.testing.assert_allclose(got, number, rtol=slopes, atol=slopes, err_msg=name)
    return found


def padding_is_invisible(
    fn: Callable[..., jax.Array], arrays: Arrays, length: int, *, atol: float = 1e-5
) -> None:
    """Tokens behind `length` change nothing, whatever they hold, and get no gradient.

    Args:
      fn: takes [T, ...] arrays by name, and `key_mask`.
      arrays: of T tokens, T > length.
      length: how many of them are real.
      atol: of the output, against `fn` on those alone.
    """
    total = len(next(iter(arrays.values())))
    real = np.arange(total) < length

    def ours(**arrays: jax.Array) -> jax.Array:
        return fn(**arrays, key_mask=real)[:length]

    clean, dirty = (
        value_and_grads(
            ours,
            {
                n: np.concatenate([x[:length], 0 * x[length:] + fill])
                for n, x in arrays.items()
            },
        )
        for fill in (np.float32(0), np.float32(1e9))
    )
    alone = jax.jit(fn)(**{name: x[:length] for name, x in arrays.items()})
    np.testing.assert_allclose(clean["out"], alone, atol=atol)
    for name, found in clean.items():
        np.testing.assert_array_equal(found, dirty[name], err_msg=name)
        if name != "out":
            assert not found[length:].any() and found[:length].any(), name


def nothing_gives_zeros(fn: Callable[..., jax.Array], arrays: Arrays) -> None:
    """Without a real key the output is zero, and so are all gradients."""
    none = np.zeros(len(next(iter(arrays.values()))), bool)
    found = value_and_grads(lambda **given: fn(**given, key_mask=none), arrays)
    assert not any(np.any(array) for array in found.values())


def by_loops(
    score: Callable[[np.ndarray, np.ndarray], float],
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    bias: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    is_causal: bool = False,
    normalize: str = "softmax",
) -> np.ndarray:
    """Attention from its equations, pair by pair in float64."""
    out = np.zeros((len(query), value.shape[1]), np.float64)
    for t in range(len(query)):
        scores = {}
        for s in range(len(key)):
            allowed = (
                (mask is None or mask[t, s])
                and (key_mask is None or key_mask[s])
                and (not is_causal or s <= t)
            )
            if allowed:
                scores[s] = score(query[t], key[s])
                if bias is not None:
                    scores[s] += float(bias[t, s])
        if not scores:
            continue
        top = max(scores.values())
        total = sum(np.exp(x - top) for x in scores.values())
        for s, x in scores.items():
            weight = {
                "softmax": np.exp(x - top) / total,
                "relu": max(x, 0.0) / len(scores),
                "sigmoid": 1.0 / (1.0 + np.exp(np.log(len(scores)) - x)),
            }[normalize]
            out[t] += weight * np.asarray(value[s], np.float64)
    return out


def slope(
    fn: Callable[..., np.ndarray],
    arrays: dict[str, np.ndarray],
    directions: dict[str, np.ndarray],
    cotangent: np.ndarray,
) -> dict[str, float]:
    """d/dε Σ cotangent · fn(array + ε direction), per array, by central differences."""
    step = 1e-5
    slopes = {}
    for name in arrays:
        ends = []
        for sign in (1.0, -1.0):
            moved = arrays[name] + sign * step * directions[name]
            ends.append(float(np.sum(cotangent * fn(**{**arrays, name: moved}))))
        slopes[name] = (ends[0] - ends[1]) / (2 * step)
    return slopes


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Of a process on this checkout with so many devices, for `subprocess`.

    It keeps compiled programs where this session does: not for one that is killed
    while it compiles.
    """
    variables = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    kept = jax.config.jax_compilation_cache_dir
    if kept:
        variables["JAX_COMPILATION_CACHE_DIR"] = kept
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return os.environ | variables | more


def run(*arguments: str, devices: int = 1, **more: str) -> str:
    """What Python says on stdout, run with the arguments; it must end with 0.

    Args:
      arguments: of the interpreter.
      devices: of the CPU.
      more: variables of the environment.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(devices, **more),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
