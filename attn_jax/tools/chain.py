"""What of a JAX program must wait: the longest chain of dependent operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from attn_jax.tools.cost import BY_INPUT, FREE, OPAQUE, PRODUCTS, is_float

__all__ = ["Chain", "chain_length"]


class Chain(NamedTuple):
    """The longest chain of operations of which each needs the one before.

    Attributes:
      operations: its links, an operation on whole arrays as one.
      rounds: the same, a sum of n numbers as the ⌈log₂ n⌉ rounds of additions that it
        takes with enough processors; those inside of a product too.
      exact: False if it may be longer: a loop's length depends on data, so that its
        body was taken once, or what a library does cannot be seen.
    """

    operations: int
    rounds: int
    exact: bool = True


def _rounds(eqn: Any) -> int:
    """How many operations on single numbers an operation on arrays waits for."""
    name, params = eqn.primitive.name, eqn.params
    inputs, (out, *_) = [x.aval for x in eqn.invars], eqn.outvars
    summed, more = 1, 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed, more = math.prod(inputs[0].shape[axis] for axis in contracted), 1
    elif name == "conv_general_dilated":
        kernel = params["dimension_numbers"].rhs_spec
        summed = math.prod(inputs[1].shape) // inputs[1].shape[kernel[0]]
        more = 1
    elif name == "fft":
        summed = math.prod(params["fft_lengths"])
    elif name.startswith("reduce_window"):
        summed = math.prod(params["window_dimensions"])
    elif name.startswith("cum"):
        summed = inputs[0].shape[params["axis"]]
    elif name in BY_INPUT:
        summed = math.prod(inputs[0].shape) // max(1, math.prod(out.aval.shape))
    elif name.startswith("scatter"):  # all into one place, at worst
        summed = math.prod(inputs[2].shape)
    return max(1, more + max(0, summed - 1).bit_length())


# What holds a jaxpr of how two numbers become one.
_COMBINING = ("reduce", "scatter", "select_and_")

# Algorithms of a library, whose own order is not seen.
_LIBRARY = set(PRODUCTS) - {"dot_general", "conv_general_dilated", "fft"}


class _Waiting:
    """How many links come before each array of a jaxpr is there."""

    def __init__(self, links: Callable[[Any], int]):
        self.links, self.exact = links, True

    def outputs(self, jaxpr: Any, inputs: Sequence[int]) -> list[int]:
        """Of its outputs, given those of its inputs."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

        def before(atom: Any) -> int:
            return 0 if isinstance(atom, core.Literal) else known.get(atom, 0)

        for eqn in jaxpr.eqns:
            found = self._of_equation(eqn, [before(x) for x in eqn.invars])
            known.update(zip(eqn.outvars, found, strict=True))
        return [before(x) for x in jaxpr.outvars]

    def _of_equation(self, eqn: Any, inputs: list[int]) -> list[int]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(params, inputs)
        if name == "while":
            self.exact = False
            return self.outputs(params["body_jaxpr"], inputs[params["cond_nconsts"] :])
        if name == "cond":
            which, *operands = inputs
            found = [self.outputs(branch, operands) for branch in params["branches"]]
            return [max(which, *links) for links in zip(*found, strict=True)]
        latest, inner = max(inputs, default=0), list(core.jaxprs_in_params(params))
        if name.startswith(_COMBINING):
            inner = []
        elif len(inner) == 1 and name != "pallas_call":
            # jit, checkpoint, custom_jvp_call, custom_vjp_call, shard_map, ...
            if len(getattr(inner[0], "jaxpr", inner[0]).invars) == len(inputs):
                return self.outputs(inner[0], inputs)
        if inner or name in OPAQUE or name in _LIBRARY:
            self.exact = False
        free = name in FREE or not any(map(is_float, eqn.outvars))
        return [latest + (0 if free else self.links(eqn))] * len(eqn.outvars)

    def _scan(self, params: Any, inputs: list[int]) -> list[int]:
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        constant, carry, each = inputs[:first], inputs[first:last], inputs[last:]
        stacked: list[int] | None = None
        for _ in range(params["length"]):
            out = self.outputs(params["jaxpr"], [*constant, *carry, *each])
            moved, rows = out[: len(carry)], out[len(carry) :]
            stacked = rows if stacked is None else [*map(max, stacked, rows)]
            if moved == carry:  # nothing is handed on: all the others are like this one
                break
            carry = moved
        zeros = [0] * (len(params["jaxpr"].jaxpr.outvars) - len(carry))
        return [*carry, *(zeros if stacked is None else stacked)]


def chain_length(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Chain:
    """The longest chain of dependent operations in `fn(*args, **kwargs)`.

    What a machine with any number of processors must still do one after the other, as
    the program is written: its least time, where `count_flops` is its work. Nothing is
    computed.

    | what | links |
    |---|---|
    | arithmetic on floating-point arrays | 1, however many elements |
    | what only moves, selects, compares or converts; integers | none |
    | `scan`, `lax.map`, `fori_loop` of known length | through what one turn hands to
      the next, as often as it runs; turns that hand on nothing count once |
    | `cond` | its longest branch |
    | `while_loop` | its body once, and the result is not `exact` |
    | calls without a jaxpr, factorizations, kernels | 1, and it is not `exact` |
    | custom_vjp, custom_jvp, checkpoint, jit | what is inside |

    An array is there when all of it is. What no output needs does not count.

    Args:
      fn: a function that JAX can trace.
      *args: its arguments; `jax.ShapeDtypeStruct` will do for arrays.
      **kwargs: named arguments, traced like the others.

    Returns:
      The lengths, sums as one link and as trees.

    Reference: depth beside work, as in Blelloch, 1996, Programming parallel algorithms;
    of layers, Vaswani et al., 2017, arXiv:1706.03762, table 1, "sequential operations".

    >>> import jax.numpy as jnp
    >>> x = jnp.ones(8)
    >>> chain_length(jnp.sum, x)
    Chain(operations=1, rounds=3, exact=True)
    >>> def recurrent(x):
    ...     return jax.lax.scan(lambda h, x: (jnp.tanh(h + x), h), x[0], x)
    >>> chain_length(recurrent, x).operations
    16
    >>> chain_length(lambda x: jax.lax.map(jnp.tanh, x), x).operations
    1
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs)
    inputs = [0] * len(jaxpr.jaxpr.invars)
    one, tree = _Waiting(lambda eqn: 1), _Waiting(_rounds)
    operations, rounds = (
        max(way.outputs(jaxpr, inputs), default=0) for way in (one, tree)
    )
    return Chain(operations, rounds, one.exact)
