"""DictionaryLookup: a graph whose queries each have to find the key of their own.

Every graph is complete and bipartite: k keys, each with a number of its own and a
value, and k queries, each with a number. A query has to say the value of its key. Only
attention that ranks the keys differently for each query can do that.

Source: Brody et al., How attentive are graph attention networks?, arXiv:2105.14491,
section 4.1.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax.nn.positional import num_parameters
from experiments.core import devices, optim
from experiments.core.loop import Indexed, Program, Task, in_epochs
from experiments.graphs.cells import DictionaryCell
from experiments.graphs.model import Edges, GraphLabeller

# Graphs that are held out for validation, and for the test.
HELD_OUT = 500

_PARTS = {"train": 0, "validation": 1, "test": 2}


@functools.lru_cache(maxsize=8)
def lookup_graphs(keys: int, count: int, part: str) -> np.ndarray:
    """The value of every key, a random order of 0 … k − 1 for each graph.

    Args:
      keys: k.
      count: number of graphs.
      part: "train", "validation" or "test".

    Returns:
      int32 [count, k], read-only.

    >>> sorted(lookup_graphs(4, 2, "train")[0].tolist())
    [0, 1, 2, 3]
    """
    rng = np.random.default_rng([keys, _PARTS[part]])
    found = rng.permuted(np.tile(np.arange(keys, dtype=np.int32), (count, 1)), axis=1)
    found.flags.writeable = False
    return found


def nodes_and_edges(values: jax.Array) -> tuple[jax.Array, Edges]:
    """Graphs side by side as one: keys, then queries, of each.

    Args:
      values: int [B, k], as of `lookup_graphs`.

    Returns:
      Nodes int [B · 2k, 2], number and value (k for a query, which has none), and the
      edges from every key to every query of its graph.
    """
    graphs, keys = values.shape
    numbers = jnp.broadcast_to(jnp.arange(keys, dtype=values.dtype), (graphs, keys))
    of_keys = jnp.stack([numbers, values], axis=-1)
    of_queries = jnp.stack([numbers, jnp.full_like(values, keys)], axis=-1)
    nodes = jnp.concatenate([of_keys, of_queries], axis=1).reshape(-1, 2)
    start = np.arange(graphs)[:, None, None] * 2 * keys
    senders = start + np.arange(keys)[None, None, :]
    receivers = start + keys + np.arange(keys)[None, :, None]
    shape = (graphs, keys, keys)
    both = (np.broadcast_to(x, shape).ravel() for x in (senders, receivers))
    return nodes, Edges(*(jnp.asarray(x, jnp.int32) for x in both))


_SHAPE = ("keys", "score", "dim", "depth", "num_heads", "mlp_dim", "dropout_rate")


@functools.lru_cache(maxsize=16)
def _program(shape: tuple[Any, ...]) -> Program:
    traits = dict(zip(_SHAPE, shape, strict=True))
    size = traits.pop("keys")

    def build(seed: int) -> GraphLabeller:
        return GraphLabeller((size, size + 1), size, rngs=nnx.Rngs(seed), **traits)

    apply, _ = optim.split_model(build(0))

    def logits(params: Any, values: jax.Array, rng: jax.Array | None) -> jax.Array:
        nodes, edges = nodes_and_edges(values)
        graphs, keys = values.shape
        at = np.arange(graphs)[:, None] * 2 * keys + keys + np.arange(keys)[None]
        wanted = jnp.asarray(at.ravel(), jnp.int32)
        return apply(params, nodes, edges, None, wanted, rng=rng)

    def loss(
        params: Any, values: jax.Array, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        found, right = logits(params, values, rng), values.reshape(-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(found, right).mean()
        hits = (jnp.argmax(found, -1) == right).astype(jnp.float32)
        return loss, {"accuracy": hits.mean()}

    def hits(params: Any, values: jax.Array) -> jax.Array:
        """How many queries of each graph are answered rightly, [B]."""
        found = jnp.argmax(logits(params, values, None), -1).reshape(values.shape)
        return (found == values).sum(axis=1)

    return Program(
        lambda seed: optim.split_model(build(seed))[1],
        loss,
        {"hits": hits, "params": num_parameters(nnx.eval_shape(lambda: build(0)))},
    )


class DictionaryTask(Task):
    """DictionaryLookup."""

    def program(self, cell: DictionaryCell) -> Program:
        return _program(tuple(getattr(cell, name) for name in _SHAPE))

    def batches(self, cell: DictionaryCell) -> Indexed:
        graphs = lookup_graphs(cell.keys, cell.graphs, "train")
        return Indexed(graphs, in_epochs(cell, len(graphs)))

    def costs(self, cell: DictionaryCell) -> dict[str, Any]:
        """Number of parameters."""
        return {"params": self.program(cell).more["params"]}

    def score(self, cell: DictionaryCell, params: Any) -> dict[str, Any]:
        """Accuracy on the training graphs, and on graphs never seen."""
        tune = cell.phase == "tune"
        prefix, part = ("val", "validation") if tune else ("test", "test")
        hits_of, found = self.program(cell).more["hits"], {}
        for name, graphs in (
            ("train", lookup_graphs(cell.keys, cell.graphs, "train")),
            (prefix, lookup_graphs(cell.keys, cell.held_out, part)),
        ):
            count = cell.batch_size
            fill = -len(graphs) % count  # the last batch has as many rows as others
            filled = np.concatenate([graphs, graphs[:1].repeat(fill, axis=0)])
            hits = np.concatenate(
                [
                    devices.call(hits_of, params, filled[i : i + count])
                    for i in range(0, len(filled), count)
                ]
            )[: len(graphs)]
            found[f"{name}_accuracy"] = float(hits.mean() / cell.keys)
            found[f"{name}_whole_graphs"] = float(np.mean(hits == cell.keys))
        return found
