"""Plans the cells of the experiment."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from experiments.core import identity
from experiments.core.driver import Plan
from experiments.core.studies import Study
from experiments.data import graphs, molecules
from experiments.graphs import nodes, regression
from experiments.graphs.cells import DictionaryCell, MoleculeCell, NodeCell
from experiments.graphs.dictionary import HELD_OUT, DictionaryRunner
from experiments.graphs.presets import DICTIONARY, MOLECULES, WORDNET, Experiment


def dictionary_plan(experiment: Experiment) -> Plan:
    """DictionaryLookup: the learning rate is chosen for every model and k."""
    studies = {}
    for keys in experiment.keys:
        for model in experiment.lookup_models:
            cell = DictionaryCell(
                task="dictionary",
                model=model,
                seed=0,
                updates=max(1, experiment.lookup_updates // 3),
                dim=experiment.lookup_dim,
                depth=1,
                mlp_dim=0,
                keys=keys,
                graphs=experiment.lookup_graphs,
                batch_size=32,
                held_out=HELD_OUT,
                learning_rate=experiment.lookup_rates[0],
                weight_decay=0.0,
                **DICTIONARY[model],
            )
            grid = tuple(
                dataclasses.replace(cell, learning_rate=rate)
                for rate in experiment.lookup_rates
            )
            name = f"{model} k={keys}"
            studies[name] = Study(
                name, grid, experiment.lookup_updates, experiment.seeds
            )
    sizes = ", ".join(map(str, experiment.keys))
    described = (
        f"dictionary: {experiment.lookup_graphs:,} training graphs for each of k = "
        f"{sizes}, generated"
    )
    return Plan("dictionary", described, studies, {}, DictionaryRunner)


def wordnet_task(experiment: Experiment) -> nodes.Task:
    """WordNet, or the first of its nodes, with its parts."""
    graph = graphs.load_wordnet()
    if experiment.nodes is not None:
        graph = graphs.first_nodes(graph, experiment.nodes)
    held_out = experiment.node_test, max(1, experiment.node_test // 2)
    return nodes.Task(graph, test=held_out[0], validation=held_out[1])


def node_cell(
    experiment: Experiment,
    graph: graphs.NodeGraph,
    model: str,
    n: int,
    differs: identity.Differs = (),
) -> NodeCell:
    """The cell of a model with n training nodes."""
    traits: dict[str, Any] = WORDNET[model]
    return NodeCell(
        task="wordnet",
        model=model,
        seed=0,
        updates=experiment.node_updates,
        dim=experiment.node_dim,
        depth=experiment.node_depth,
        num_heads=experiment.node_heads,
        head_dim=experiment.node_head_dim,
        mlp_dim=experiment.node_dim,
        n=n,
        data=graph.sha256,
        shown=0.7 if traits["reads_labels"] else 0.0,
        features=experiment.node_features,
        learning_rate=experiment.node_rate,
        differs=differs,
        **traits,
    )


def wordnet_plan(experiment: Experiment) -> Plan:
    """The nodes of WordNet; one learning rate, which the preset gives."""
    task = wordnet_task(experiment)
    if max(experiment.node_ns) > len(task.pool):
        raise ValueError(
            f"node_ns must be at most {len(task.pool):,}, the nodes that are not held "
            f"out, got {max(experiment.node_ns):,}."
        )
    parts = dict(test=len(task.test), validation=len(task.validation))
    differs = identity.differs("wordnet", text_features=graphs.TEXT_FEATURES, **parts)
    studies = {}
    for n in experiment.node_ns:
        first = n == experiment.node_ns[0]
        for model in experiment.node_models if first else experiment.node_few:
            cell = node_cell(experiment, task.graph, model, n, differs)
            name = f"{model} n={n}"
            studies[name] = Study(
                name, (cell,), experiment.node_updates, experiment.seeds
            )
    floors = nodes.baselines(task, experiment.node_ns)
    made_of = identity.differs(
        "wordnet",
        data_sha256=task.graph.sha256,
        node_ns=list(experiment.node_ns),
        **parts,
    )
    return Plan(
        "wordnet",
        task.graph.describe(),
        studies,
        floors,
        functools.partial(nodes.NodeRunner, task),
        dict.fromkeys(floors, made_of),
    )


def molecule_plan(experiment: Experiment, name: molecules.Task) -> Plan:
    """The molecules of one table; one learning rate, which the preset gives."""
    data = molecules.load_molecules(name, limit=experiment.molecules)
    task = regression.Task(data)
    epochs = experiment.epochs if name == "melting_point" else experiment.logp_epochs
    parts = dict(split=identity.digest(task.train, task.validation, task.test))
    differs = identity.differs(
        name,
        graphs=identity.digest([(graph.atoms, graph.pairs) for graph in data.graphs]),
        **parts,
    )
    studies = {}
    for model in experiment.molecule_models:
        cell = MoleculeCell(
            task=name,
            model=model,
            seed=0,
            updates=1,
            dim=experiment.molecule_dim,
            depth=experiment.molecule_depth,
            num_heads=experiment.molecule_heads,
            mlp_dim=2 * experiment.molecule_dim,
            dropout_rate=experiment.molecule_dropout,
            data=data.sha256,
            batch_atoms=experiment.batch_atoms,
            learning_rate=experiment.molecule_rate,
            weight_decay=0.05,
            differs=differs,
            **MOLECULES[model],
        )
        indices = task.part("final")[0]
        batches = regression.Epochs(task, indices, experiment.batch_atoms, 0, "final")
        studies[model] = Study(
            model,
            (cell,),
            epochs * batches.size,
            experiment.seeds,
            metric="val_rmse",
            minimise=True,
        )
    floors = regression.baselines(task, experiment.trees)
    made_of = dict.fromkeys(
        floors, identity.differs(name, data_sha256=data.sha256, **parts)
    )
    made_of["forest"] = identity.differs(
        name, data_sha256=data.sha256, trees=experiment.trees, **parts
    )
    return Plan(
        name,
        data.describe(),
        studies,
        floors,
        functools.partial(regression.MoleculeRunner, task),
        made_of,
    )


def make_plans(experiment: Experiment) -> list[Plan]:
    """Loads the data of the tasks and plans their cells.

    Raises:
      DataError, ValueError: the data cannot be had; a bad value.
    """
    makers: dict[str, Callable[[Experiment], Plan]] = {
        "dictionary": dictionary_plan,
        "wordnet": wordnet_plan,
        "melting_point": functools.partial(molecule_plan, name="melting_point"),
        "logp": functools.partial(molecule_plan, name="logp"),
    }
    wanted = list(makers) if experiment.task == "all" else [experiment.task]
    return [makers[name](experiment) for name in wanted]
