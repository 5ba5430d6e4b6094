"""Classification of the nodes of one large graph, all of it at every update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax.nn.positional import num_parameters
from experiments.core import devices, optim
from experiments.core.loop import Batches, Program, Task
from experiments.data import graphs
from experiments.data.graphs import NodeGraph
from experiments.graphs.cells import NodeCell
from experiments.graphs.model import Edges, GraphLabeller

# Subsets of the training labels whose propagation a cell makes once and takes in turn.
_DRAWS = 8


class Inputs(NamedTuple):
    """What an update reads, and every node's label; arrays of one graph.

    Attributes:
      nodes: float32 [N, F].
      edges: as of `experiments.data.graphs.attention_edges`.
      labels: int32 [N].
      train: int32 [n], the nodes whose label may be used.
      show: bool [n], which of them are read in this update, or None for a random draw.
      spread: float32 [N, classes], what label propagation makes of those, or None.
    """

    nodes: Any
    edges: Edges
    labels: Any
    train: Any
    show: Any = None
    spread: Any = None


def edges_of(graph: NodeGraph) -> Edges:
    """The edges of a graph, with loops, as arrays of numpy."""
    arrays: Any = graphs.attention_edges(graph)
    return Edges(*arrays)


class Nodes:
    """A graph with the parts of its nodes, and vectors for them when asked for.

    Args:
      graph: the graph.
      test, validation: numbers of nodes that are held out.
    """

    def __init__(self, graph: NodeGraph, *, test: int, validation: int):
        self.graph = graph
        self.pool, self.validation, self.test = graphs.split_nodes(
            graph.num_nodes, test=test, validation=validation
        )
        self._features: dict[int, np.ndarray] = {}

    def inputs(self, n: int, features: int) -> Inputs:
        """The inputs of a model with n training nodes, as arrays of numpy."""
        if n > len(self.pool):
            raise ValueError(
                f"n must be at most {len(self.pool):,}, the nodes of "
                f"{self.graph.name} that are not held out, got {n:,}."
            )
        if features not in self._features:
            self._features[features] = graphs.text_features(self.graph, features)
        return Inputs(
            self._features[features],
            edges_of(self.graph),
            self.graph.labels,
            self.pool[:n].astype(np.int32),
        )


_SHAPE = (
    "score kinds reads_labels shown features dim depth num_heads head_dim mlp_dim "
    "dropout_rate propagated"
).split()


@functools.lru_cache(maxsize=16)
def _program(shape: tuple[Any, ...], num_kinds: int, num_classes: int) -> Program:
    traits = dict(zip(_SHAPE, shape, strict=True))
    reads, shown = traits["reads_labels"], traits["shown"]

    def build(seed: int) -> GraphLabeller:
        names = "dim depth num_heads head_dim mlp_dim score reads_labels dropout_rate"
        return GraphLabeller(
            traits["features"] + (num_classes if traits["propagated"] else 0),
            num_classes,
            num_kinds=num_kinds if traits["kinds"] else 0,
            rngs=nnx.Rngs(seed),
            **{name: traits[name] for name in names.split()},
        )

    apply, _ = optim.split_model(build(0))

    def vectors(inputs: Inputs) -> jax.Array:
        """What a node's input is made of, numbers near 1."""
        if inputs.spread is None:
            return inputs.nodes
        scaled = inputs.spread * num_classes**0.5
        return jnp.concatenate([inputs.nodes, scaled], axis=1)

    def given(inputs: Inputs, show: jax.Array) -> jax.Array | None:
        """The labels that the network reads: those of some training nodes."""
        if not reads:
            return None
        labels = jnp.where(show, inputs.labels[inputs.train], -1)
        return jnp.full_like(inputs.labels, -1).at[inputs.train].set(labels)

    def loss(
        params: Any, inputs: Inputs, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        show_rng, dropout_rng = jax.random.split(rng)
        show = inputs.show
        if show is None:
            share = shown if reads else 0.0
            show = jax.random.bernoulli(show_rng, share, inputs.train.shape)
        logits = apply(
            params,
            vectors(inputs),
            inputs.edges,
            given(inputs, show),
            inputs.train,
            rng=dropout_rng,
        )
        right = inputs.labels[inputs.train]
        weights = (~show).astype(jnp.float32)
        weights = weights / jnp.maximum(weights.sum(), 1.0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, right)
        hits = (jnp.argmax(logits, -1) == right).astype(jnp.float32)
        return (losses * weights).sum(), {"accuracy": (hits * weights).sum()}

    def predict(params: Any, inputs: Inputs) -> jax.Array:
        """The class of every node, [N], with all training labels given."""
        known = given(inputs, jnp.ones(inputs.train.shape, bool))
        return jnp.argmax(apply(params, vectors(inputs), inputs.edges, known), -1)

    return Program(
        lambda seed: optim.split_model(build(seed))[1],
        loss,
        {
            "predict": jax.jit(predict),
            "params": num_parameters(nnx.eval_shape(lambda: build(0))),
        },
    )


def program_of(cell: NodeCell, graph: NodeGraph) -> Program:
    """What cells of one shape of model compute."""
    shape = tuple(getattr(cell, name) for name in _SHAPE)
    return _program(shape, len(graph.kind_names) + 1, len(graph.class_names))


class _Draws:
    """The same inputs at every update, or a few draws of them in turn."""

    def __init__(self, draws: Sequence[Inputs]):
        self._draws = draws

    def __getitem__(self, step: int) -> Inputs:
        return self._draws[step % len(self._draws)]


class NodeTask(Task):
    """Classifies the nodes of one graph.

    Args:
      nodes: the graph and its parts.
    """

    splits = scans = False

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self._placed: dict[tuple[int, int], Inputs] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_placed": {}}  # a worker has devices of its own

    def program(self, cell: NodeCell) -> Program:
        return program_of(cell, self.nodes.graph)

    def _inputs(self, cell: NodeCell) -> Inputs:
        """On the devices, all of it on each, once for all cells."""
        if cell.data != self.nodes.graph.sha256:
            raise ValueError(
                f"data: the cell is of {cell.data}, but this graph is "
                f"{self.nodes.graph.sha256}."
            )
        key = cell.n, cell.features
        if key not in self._placed:
            self._placed[key] = devices.put(
                self.nodes.inputs(*key), devices.data_mesh()
            )
        return self._placed[key]

    def _with_spread(self, cell: NodeCell, show: np.ndarray) -> Inputs:
        """The inputs with the labels of some training nodes propagated."""
        inputs, graph = self._inputs(cell), self.nodes.graph
        spread = graphs.label_propagation(
            graph.senders,
            graph.receivers,
            graph.labels,
            self.nodes.pool[: cell.n][show],
            len(graph.class_names),
            steps=cell.propagated,
        )
        placed = devices.put((show, spread.astype(np.float32)), devices.data_mesh())
        return inputs._replace(show=placed[0], spread=placed[1])

    def batches(self, cell: NodeCell) -> Batches:
        """The graph as the batch of every update."""
        if not cell.propagated:
            return _Draws([self._inputs(cell)])
        rng = np.random.default_rng([cell.seed, 9])
        return _Draws(
            [
                self._with_spread(cell, rng.random(cell.n) < cell.shown)
                for _ in range(_DRAWS)
            ]
        )

    def trace(self, cell: NodeCell, program: Program) -> None:
        """No attention of a user's comes here."""

    def costs(self, cell: NodeCell) -> dict[str, Any]:
        """Number of parameters."""
        return {"params": self.program(cell).more["params"]}

    def score(self, cell: NodeCell, params: Any) -> dict[str, Any]:
        """Accuracy on the held-out part."""
        inputs = self._inputs(cell)
        if cell.propagated:
            inputs = self._with_spread(cell, np.ones(cell.n, bool))
        found = devices.fetch(self.program(cell).more["predict"](params, inputs))
        return scored(self.nodes, found, cell.phase)


def scored(task: Nodes, found: np.ndarray, phase: str) -> dict[str, float]:
    """Accuracy on the part that a phase reads."""
    tune = phase == "tune"
    prefix, part = ("val", task.validation) if tune else ("test", task.test)
    return {
        f"{prefix}_accuracy": float(np.mean(found[part] == task.graph.labels[part]))
    }


# --- Baselines ---------------------------------------------------------------------

# method(task, n) -> (class of every node, what was chosen on the validation part)
Method = Callable[[Nodes, int], tuple[np.ndarray, str]]

# What is tried on the validation part.
_STRENGTHS = (3.0, 10.0)
_STEPS = (20, 50, 200)
_IS_A = ("@", "@i", "~", "~i")


def baselines(
    task: Nodes, sizes: Sequence[int]
) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """What needs no network, by name; each gives its scores for all sizes."""
    methods: dict[str, Method] = {
        "majority": _majority,
        "text": _text,
        "label_propagation": functools.partial(_propagation, kinds=None),
    }
    if set(_IS_A) <= set(task.graph.kind_names):
        methods["label_propagation_is_a"] = functools.partial(_propagation, kinds=_IS_A)

    return {
        name: functools.partial(_measured, method, task, tuple(sizes))
        for name, method in methods.items()
    }


def _measured(method: Method, task: Nodes, sizes: Sequence[int]) -> dict[str, Any]:
    """The scores of a method for all sizes."""
    found: dict[str, Any] = {}
    for n in sizes:
        classes, chosen = method(task, n)
        found[f"chosen_{n}"] = chosen
        for phase in ("tune", "final"):
            for name, value in scored(task, classes, phase).items():
                found[f"{name}_{n}"] = value
    return found


def _majority(task: Nodes, n: int) -> tuple[np.ndarray, str]:
    """The most frequent class for all."""
    labels = task.graph.labels
    most = np.bincount(labels[task.pool[:n]]).argmax()
    return np.full(len(labels), most), ""


def _text(task: Nodes, n: int) -> tuple[np.ndarray, str]:
    """Logistic regression on the words of a node's own text."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    words: Any = graphs.tf_idf(task.graph)
    labels, known = task.graph.labels, task.pool[:n]
    tried = []
    with threadpool_limits(1):
        for strength in _STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=100)
            model.fit(words[known], labels[known])
            found = model.predict(words)
            value = scored(task, found, "tune")["val_accuracy"]
            tried.append((value, found, f"C = {strength:g}"))
    return max(tried, key=lambda entry: entry[0])[1:]


def _propagation(
    task: Nodes, n: int, kinds: Sequence[str] | None
) -> tuple[np.ndarray, str]:
    """Label propagation along all edges, or along those of some kinds."""
    graph = task.graph
    kept = np.ones(len(graph.kinds), bool)
    if kinds is not None:
        kept = np.isin(np.asarray(graph.kind_names)[graph.kinds], kinds)
    tried = []
    for steps in _STEPS:
        found = graphs.label_propagation(
            graph.senders[kept],
            graph.receivers[kept],
            graph.labels,
            task.pool[:n],
            len(graph.class_names),
            steps=steps,
        ).argmax(1)
        value = scored(task, found, "tune")["val_accuracy"]
        tried.append((value, found, f"{steps} steps"))
    return max(tried, key=lambda entry: entry[0])[1:]
