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
from experiments.core import train, trial
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


class Task:
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


def build(cell: NodeCell, graph: NodeGraph, seed: int) -> GraphLabeller:
    """The model of a cell."""
    return _build(
        tuple(getattr(cell, name) for name in _SHAPE),
        len(graph.kind_names) + 1,
        len(graph.class_names),
        seed,
    )


def _build(
    shape: tuple[Any, ...], num_kinds: int, num_classes: int, seed: int
) -> GraphLabeller:
    traits = dict(zip(_SHAPE, shape, strict=True))
    return GraphLabeller(
        traits["features"] + (num_classes if traits["propagated"] else 0),
        num_classes,
        dim=traits["dim"],
        depth=traits["depth"],
        num_heads=traits["num_heads"],
        head_dim=traits["head_dim"],
        mlp_dim=traits["mlp_dim"],
        score=traits["score"],
        num_kinds=num_kinds if traits["kinds"] else 0,
        reads_labels=traits["reads_labels"],
        dropout_rate=traits["dropout_rate"],
        rngs=nnx.Rngs(seed),
    )


class Programs(NamedTuple):
    """Compiled functions of a model."""

    step: trial.Step
    predict: Callable[[Any, Inputs], jax.Array]


@functools.lru_cache(maxsize=16)
def _programs(shape: tuple[Any, ...], num_kinds: int, num_classes: int) -> Programs:
    apply, _ = train.split_model(_build(shape, num_kinds, num_classes, 0))
    traits = dict(zip(_SHAPE, shape, strict=True))
    reads, shown = traits["reads_labels"], traits["shown"]

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

    def loss_fn(
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

    return Programs(
        jax.jit(trial.make_step(loss_fn), donate_argnums=0), jax.jit(predict)
    )


def programs(cell: NodeCell, graph: NodeGraph) -> Programs:
    """The compiled functions of a cell."""
    shape = tuple(getattr(cell, name) for name in _SHAPE)
    return _programs(shape, len(graph.kind_names) + 1, len(graph.class_names))


class NodeRunner(trial.Runner):
    """Trains and scores cells of one graph.

    Args:
      task: the graph and its parts.
      *common: of `experiments.core.trial.Runner`.
    """

    def __init__(self, task: Task, *common: Any):
        super().__init__(*common)
        self.task = task
        self._placed: dict[tuple[int, int], Inputs] = {}

    def _inputs(self, cell: NodeCell) -> Inputs:
        """On the devices, all of it on each, once for all cells."""
        if cell.data != self.task.graph.sha256:
            raise ValueError(
                f"data: the cell is of {cell.data}, but this graph is "
                f"{self.task.graph.sha256}."
            )
        key = cell.n, cell.features
        if key not in self._placed:
            self._placed[key] = train.put(self.task.inputs(*key), self.mesh)
        return self._placed[key]

    def _with_spread(self, cell: NodeCell, show: np.ndarray) -> Inputs:
        """The inputs with the labels of some training nodes propagated."""
        inputs, graph = self._inputs(cell), self.task.graph
        spread = graphs.label_propagation(
            graph.senders,
            graph.receivers,
            graph.labels,
            self.task.pool[: cell.n][show],
            len(graph.class_names),
            steps=cell.propagated,
        )
        placed = train.put((show, spread.astype(np.float32)), self.mesh)
        return inputs._replace(show=placed[0], spread=placed[1])

    def start(self, cell: NodeCell) -> trial.Job:
        """Parameters, step, and the graph as the batch of every update."""
        params = train.split_model(build(cell, self.task.graph, cell.seed))[1]
        step = programs(cell, self.task.graph).step
        if not cell.propagated:
            inputs = self._inputs(cell)
            return trial.Job(params, step, lambda k: inputs, split=False)
        rng = np.random.default_rng([cell.seed, 9])
        draws = [
            self._with_spread(cell, rng.random(cell.n) < cell.shown)
            for _ in range(_DRAWS)
        ]
        return trial.Job(params, step, lambda k: draws[k % _DRAWS], split=False)

    def costs(self, cell: NodeCell) -> dict[str, Any]:
        """Number of parameters."""
        return {
            "params": num_parameters(
                nnx.eval_shape(lambda: build(cell, self.task.graph, 0))
            )
        }

    def result(self, cell: NodeCell, params: Any) -> dict[str, Any]:
        """Accuracy on the held-out part."""
        inputs = self._inputs(cell)
        if cell.propagated:
            inputs = self._with_spread(cell, np.ones(cell.n, bool))
        found = programs(cell, self.task.graph).predict(params, inputs)
        return scored(self.task, np.asarray(found), cell.phase)


def scored(task: Task, found: np.ndarray, phase: str) -> dict[str, float]:
    """Accuracy on the part that a phase reads."""
    tune = phase == "tune"
    prefix, part = ("val", task.validation) if tune else ("test", task.test)
    return {
        f"{prefix}_accuracy": float(np.mean(found[part] == task.graph.labels[part]))
    }


# --- Baselines ---------------------------------------------------------------------

# method(task, n) -> (class of every node, what was chosen on the validation part)
Method = Callable[[Task, int], tuple[np.ndarray, str]]

# What is tried on the validation part.
_STRENGTHS = (3.0, 10.0)
_STEPS = (20, 50, 200)
_IS_A = ("@", "@i", "~", "~i")


def baselines(
    task: Task, sizes: Sequence[int]
) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """What needs no network, by name; each gives its scores for all sizes."""
    methods: dict[str, Method] = {
        "majority": _majority,
        "text": _text,
        "label_propagation": functools.partial(_propagation, kinds=None),
    }
    if set(_IS_A) <= set(task.graph.kind_names):
        methods["label_propagation_is_a"] = functools.partial(_propagation, kinds=_IS_A)

    def measure(method: Method) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for n in sizes:
            classes, chosen = method(task, n)
            found[f"chosen_{n}"] = chosen
            for phase in ("tune", "final"):
                for name, value in scored(task, classes, phase).items():
                    found[f"{name}_{n}"] = value
        return found

    return {
        name: functools.partial(measure, method) for name, method in methods.items()
    }


def _majority(task: Task, n: int) -> tuple[np.ndarray, str]:
    """The most frequent class for all."""
    labels = task.graph.labels
    most = np.bincount(labels[task.pool[:n]]).argmax()
    return np.full(len(labels), most), ""


def _text(task: Task, n: int) -> tuple[np.ndarray, str]:
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
    task: Task, n: int, kinds: Sequence[str] | None
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
