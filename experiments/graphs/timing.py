"""Time and memory of an update on a whole graph, each measured in a fresh process.

`python -m experiments.graphs.timing FOLDER` trains the models of WordNet for a few
updates, and one on a random graph of a million edges, and writes timing.json into the
folder, which the report reads.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import resource
import sys
from typing import Any

import jax
import numpy as np

from experiments.core import devices, optim
from experiments.core.measure import Folder, again, measures, one_core, seconds_of
from experiments.core.memory import keep_freed_memory
from experiments.data import graphs
from experiments.graphs import nodes
from experiments.graphs.experiment import PRESETS, Config, node_cell, wordnet_task
from experiments.graphs.report import TIMING

RANDOM = "gatv2, random graph"
_UPDATES = 5


def random_graph(num_edges: int, seed: int = 0) -> graphs.NodeGraph:
    """A graph of a quarter as many nodes as edges, which mean nothing.

    >>> graph = random_graph(400)
    >>> graph.num_nodes
    100
    """
    rng = np.random.default_rng(seed)
    count = num_edges // 4
    edges = np.zeros((num_edges, 3), np.int64)
    edges[:, :2] = rng.integers(count, size=(num_edges, 2))
    graph = graphs.toy_graph(3, seed=0)
    return dataclasses.replace(
        graph,
        name="random_graph",
        senders=edges[:, 1].astype(np.int32),
        receivers=np.sort(edges[:, 0]).astype(np.int32),
        kinds=edges[:, 2].astype(np.int32),
        labels=rng.integers(3, size=count).astype(np.int32),
        texts=("",) * count,
    )


def measure(name: str, experiment: Config, random_edges: int) -> dict[str, Any]:
    """Times updates of one model in this process.

    Args:
      name: a model of WordNet, or `RANDOM`.
      experiment: sizes.
      random_edges: edges of the random graph.

    Returns:
      Seconds an update, the least of some; bytes of the compiled program and of the
      process.
    """
    keep_freed_memory()
    mesh = devices.data_mesh()
    n, width = experiment.node_ns[0], experiment.node_features
    if name == RANDOM:
        graph = random_graph(random_edges)
        cell = node_cell(experiment, graph, "gatv2", n)
        count = graph.num_nodes
        features = np.random.default_rng(1).standard_normal((count, width), np.float32)
        known = np.arange(min(n, count), dtype=np.int32)
        inputs = nodes.Inputs(features, nodes.edges_of(graph), graph.labels, known)
    else:
        task = wordnet_task(experiment)
        graph = task.graph
        cell = node_cell(experiment, graph, name, n)
        inputs = task.inputs(n, width)
    placed = devices.put(inputs, mesh)
    program = nodes.program_of(cell, graph)
    params = program.initial_params(0)
    state = devices.put(optim.init_state(params, optim.hyper_of(cell)), mesh)
    rng = devices.put(jax.random.key(0), mesh)
    jitted = jax.jit(optim.make_step(program.loss), donate_argnums=0)
    step: Any = jitted.lower(state, placed, rng).compile()
    update = again(step, state, placed, rng)
    return dict(
        name=name,
        nodes=graph.num_nodes,
        edges=len(inputs.edges.senders),
        seconds=min(seconds_of(update, _UPDATES, warm=False)),
        program_bytes=int(step.memory_analysis().temp_size_in_bytes),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def measure_all(
    folder: Folder, *, nodes: int | None = None, random_edges: int = 1_000_000
) -> dict[str, Any]:
    """Measures all models on one core, a process each.

    Args:
      folder: of the results.
      nodes: take the first nodes alone.
      random_edges: edges of the random graph.
    """
    experiment = dataclasses.replace(PRESETS["cpu"], nodes=nodes)
    if nodes is not None:
        few = max(1, nodes // 4)
        experiment = dataclasses.replace(
            experiment, node_ns=(few,), node_test=few, node_features=16
        )
    rows = []
    for name in (*experiment.node_models, RANDOM):
        fresh = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, fresh, one_core, (-1,)) as pool:
            rows.append(pool.submit(measure, name, experiment, random_edges).result())
        print(f"{name}: {rows[-1]['seconds']:.2f} s an update", flush=True)
    return dict(cores=1, nodes=rows[0]["nodes"], rows=rows)


main = measures(TIMING, measure_all)

if __name__ == "__main__":
    sys.exit(main())
