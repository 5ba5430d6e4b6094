"""Modules as pure functions of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from experiments.common import train


def split_module(model: nnx.Module) -> tuple[Callable[..., jax.Array], Any]:
    """Splits a module into ``apply(params, *inputs, rng=None)`` and its parameters.

    Parameters are nested dictionaries of arrays. With ``rng`` dropout is on.

    >>> from flax import nnx
    >>> apply, params = split_module(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> sorted(params), apply(params, jax.numpy.ones((1, 3))).shape
    (['bias', 'kernel'], (1, 2))
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    variables, rest = states
    treedef = jax.tree.structure(variables)

    def apply(params: Any, *inputs: Any, rng: jax.Array | None = None) -> jax.Array:
        params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        if rng is None:
            return nnx.merge(graphdef, params, rest)(*inputs)
        module = nnx.merge(graphdef, params, train.redraw(rest, rng))
        return module(*inputs, deterministic=False, rngs=nnx.Rngs(dropout=rng))

    return apply, nnx.to_pure_dict(variables)


def count_parameters(make: Callable[[], nnx.Module]) -> int:
    """Number of parameters of the module that a function makes; nothing is computed.

    >>> from flax import nnx
    >>> count_parameters(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    8
    """
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
