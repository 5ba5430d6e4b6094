"""Settings and references shared by all tests."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import helpers

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


@pytest.fixture(scope="session")
def by_loops() -> Callable[..., np.ndarray]:
    """`by_loops(score, query, key, value, ...)`: attention in float64 by loops."""
    return helpers.by_loops


@pytest.fixture(scope="session")
def slope() -> Callable[..., dict[str, float]]:
    """`slope(fn, arrays, directions, cotangent)`: float64 slopes."""
    return helpers.slope


@pytest.fixture(scope="session")
def draw() -> Callable[..., dict[str, np.ndarray]]:
    """`draw({name: shape}, seed=0)`: normal float32 arrays by name."""
    return helpers.draw
