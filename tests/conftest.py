"""Settings and references shared by all tests."""

from __future__ import annotations

import itertools
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

# By the environment, so that the processes that tests start compile quickly too; this
# one has imported jax already.
_QUICK = runpy.run_path(str(Path(__file__).with_name("quick_compilation.py")))
os.environ |= _QUICK["environment"]()
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_traceback_in_locations_limit", 0)
# Of this process alone: one that a test kills could leave half a program behind. Not
# with JAX_ENABLE_COMPILATION_CACHE=0.
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", _QUICK["kept_programs"]())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# A silent promotion or broadcast is a bug somewhere: let it raise here.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiles as outside of the tests, for a test of what the optimised program does.

    That is its memory, its cost or its bits: tests of what it computes do without.
    """
    jax.clear_caches()  # they do not tell programs of either kind apart
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _no_programs_of_other_files() -> Iterator[None]:
    """Frees compiled programs after each file: no other would run them again."""
    yield
    jax.clear_caches()


def _attention_by_loops(
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


@pytest.fixture(scope="session")
def by_loops() -> Callable[..., np.ndarray]:
    """`by_loops(score, query, key, value, ...)`: attention in float64 by loops."""
    return _attention_by_loops


def _slope(
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


@pytest.fixture(scope="session")
def slope() -> Callable[..., dict[str, float]]:
    """`slope(fn, arrays, directions, cotangent)`: float64 slopes."""
    return _slope


def _draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal float32 arrays, each from a stream of its own."""
    streams = (np.random.default_rng((seed, i)) for i in itertools.count())
    return {
        name: stream.standard_normal(shape).astype(np.float32)
        for (name, shape), stream in zip(shapes.items(), streams, strict=False)
    }


@pytest.fixture(scope="session")
def draw() -> Callable[..., dict[str, np.ndarray]]:
    """`draw({name: shape}, seed=0)`: normal float32 arrays by name."""
    return _draw
