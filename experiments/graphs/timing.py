"""Time and memory of an update on a whole graph, each measured in a fresh process.

`python -m experiments.graphs.timing FOLDER` trains the models of WordNet for a few
updates, and one on a random graph of a million edges, and writes timing.json into the
folder, which the report reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_jax._program import program
from experiments.data import graphs
from experiments.graphs.experiment import PRESETS, Config
from experiments.graphs.report import TIMING

RANDOM = "gatv2, random graph"
_RANDOM_EDGES = 1_000_000
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
    import jax

    from experiments.core import devices, optim
    from experiments.core.memory import keep_freed_memory
    from experiments.graphs import nodes
    from experiments.graphs.experiment import node_cell, wordnet_task

    keep_freed_memory()
    mesh = devices.data_mesh()
    n = experiment.node_ns[0]
    if name == RANDOM:
        graph = random_graph(random_edges)
        cell = node_cell(experiment, graph, "gatv2", n)
        count = graph.num_nodes
        features = np.random.default_rng(1).standard_normal(
            (count, experiment.node_features), np.float32
        )
        known = np.arange(min(n, count), dtype=np.int32)
        edges = nodes.edges_of(graph)
        inputs = nodes.Inputs(features, edges, graph.labels, known)
    else:
        task = wordnet_task(experiment)
        graph = task.graph
        cell = node_cell(experiment, graph, name, n)
        inputs = task.inputs(n, experiment.node_features)
    placed = devices.put(inputs, mesh)
    program = nodes.program_of(cell, graph)
    params = program.initial_params(0)
    state = devices.put(optim.init_state(params, optim.hyper_of(cell)), mesh)
    rng = devices.put(jax.random.key(0), mesh)
    jitted = jax.jit(optim.make_step(program.loss), donate_argnums=0)
    step = jitted.lower(state, placed, rng).compile()
    memory = step.memory_analysis()
    seconds = []
    for _ in range(_UPDATES):
        began = time.perf_counter()
        state, metrics = step(state, placed, rng)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    return dict(
        name=name,
        nodes=graph.num_nodes,
        edges=len(inputs.edges.senders),
        seconds=min(seconds),
        program_bytes=int(memory.temp_size_in_bytes),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Measures all models, one process each; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.graphs.timing", description=__doc__
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--one", help="measure this one here, and print it")
    parser.add_argument("--nodes", type=int, help="take the first nodes alone")
    parser.add_argument("--random-edges", type=int, default=_RANDOM_EDGES)
    options = parser.parse_args(argv)
    if options.one:
        if hasattr(os, "sched_setaffinity"):  # one core, as a worker has
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
        experiment = dataclasses.replace(PRESETS["cpu"], nodes=options.nodes)
        if options.nodes is not None:
            few = max(1, options.nodes // 4)
            experiment = dataclasses.replace(
                experiment, node_ns=(few,), node_test=few, node_features=16
            )
        found = measure(options.one, experiment, options.random_edges)
        print(json.dumps(found))
        return 0
    rows = []
    for name in (*PRESETS["cpu"].node_models, RANDOM):
        command = [sys.executable, "-m", "experiments.graphs.timing"]
        command += [str(options.folder), "--one", name]
        command += ["--random-edges", str(options.random_edges)]
        if options.nodes is not None:
            command += ["--nodes", str(options.nodes)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"error: {name}: {done.stderr.strip()[-400:]}", file=sys.stderr)
            return 1
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['seconds']:.2f} s an update", flush=True)
    written = dict(cores=1, nodes=rows[0]["nodes"], rows=rows)
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(written, indent=1) + "\n"
    (options.folder / TIMING).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
