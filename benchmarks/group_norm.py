"""Group normalisation against Flax's: the gradient, as a training step needs it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.models import GroupNorm
from attn_jax.tools.bench import Program, program
from benchmarks.timing import Effort, compare


def _gradient(module: nnx.Module, x: jax.Array) -> Program:
    graphdef, state = nnx.split(module)

    def loss(state: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(nnx.merge(graphdef, state)(x)))

    return program(jax.grad(loss, argnums=(0, 1)), state, x)


def group(effort: Effort) -> dict[str, Any]:
    """Groups of 4 channels, at two shapes of the experiments' ResNet."""
    batch = 2 if effort.smoke else 64
    tables = []
    for side, channels in ((14, 20), (7, 40)):
        shape = (batch, side, side, channels)
        effort.say(f"group normalisation, {list(shape)} ...")
        x = jax.random.normal(jax.random.key(0), shape)
        flax_norm = nnx.GroupNorm(
            channels, num_groups=channels // 4, epsilon=1e-5, rngs=nnx.Rngs(0)
        )
        ours = GroupNorm(channels, num_groups=channels // 4)
        calls = {"flax": _gradient(flax_norm, x), "ours": _gradient(ours, x)}
        rows = compare(calls, ("flax",), effort)
        tables.append(dict(title=f"{list(shape)}", short=str(side), rows=rows))
    return dict(
        title="Group normalisation",
        about="Gradient for parameters and input, forward pass included, beside "
        "`flax.nnx.GroupNorm`.",
        tables=tables,
        targets=[],
    )
