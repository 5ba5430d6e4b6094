"""Who attends to whom: attention maps of trained labellers on real input.

`python -m experiments.sequence_labelling.maps FOLDER` takes the encoder that
`--preset pos` or `--preset phones` trained and kept in FOLDER, and writes its weights
on sentences such as "I saw a saw ." (or on an utterance of the test part) to maps.json,
which the report draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.core.measure import Folder, measures
from experiments.core.store import ResultsStore
from experiments.data import sequence_tasks, speech, text
from experiments.sequence_labelling.report import MAPS
from experiments.sequence_labelling.streaming import encoder_of, kept_cells, labeller_of
from experiments.tasks import labelling
from experiments.tasks.attention import weights_of

SENTENCES = (
    "I saw a saw .",
    "They can fish near the fish can .",
    "The old man the boat .",
)

# Frames of an utterance that are drawn, and how many are averaged to one.
FRAMES, POOL = 240, 6


def _map(title: str, ticks: Sequence[str], weights: Sequence[np.ndarray]) -> Any:
    """An entry of maps.json."""
    rounded = [np.round(w.astype(np.float64), 3).tolist() for w in weights]
    return dict(title=title, ticks=ticks, weights=rounded)


def _sentences(store: ResultsStore, cell: labelling.LabelCell) -> list[dict[str, Any]]:
    corpus = text.load_brown()
    data = sequence_tasks.tagging(cell.task, corpus, fine=cell.task == "pos_fine")
    vocabulary = sequence_tasks.vocabulary_of(corpus)
    params = labelling.load_params(store, cell, data)
    model = labeller_of(cell, data, params, data.max_length)
    maps = []
    for sentence in SENTENCES:
        words = tuple(sentence.split())
        ids = jnp.asarray(vocabulary.token_features(words))
        tags = model(ids[None], jnp.ones((1, len(words)), bool))[0].argmax(-1)
        names = [data.class_names[int(tag)] for tag in tags]
        ticks = ["/".join(pair) for pair in zip(words, names, strict=True)]
        weights = [w[0] for w in weights_of(encoder_of(model), model.input(ids[None]))]
        maps.append(_map(sentence, ticks, weights))
    return maps


def _utterance(store: ResultsStore, cell: labelling.LabelCell) -> list[dict[str, Any]]:
    data = sequence_tasks.phones("phones", speech.load_festvox_ru())
    params = labelling.load_params(store, cell, data)
    model = labeller_of(cell, data, params, data.max_length)
    x = jnp.asarray(data.test.inputs[0][:FRAMES])
    labels = data.test.labels[0][:FRAMES]
    weights = [w[0] for w in weights_of(encoder_of(model), model.input(x[None]))]
    size = len(x) // POOL
    pooled = [
        w[:, : size * POOL, : size * POOL]
        .reshape(w.shape[0], size, POOL, size, POOL)
        .mean(2)
        .sum(3)
        for w in weights
    ]
    names = [data.class_names[int(y)] for y in labels[: size * POOL : POOL]]
    before = ["", *names]
    ticks = [x if x != y else "" for x, y in zip(names, before, strict=False)]
    return [_map(f"utterance, {10 * POOL} ms a cell", ticks, pooled)]


def measure(folder: Folder) -> dict[str, Any]:
    """Attention weights of the dot-product transformer that trained longest.

    Args:
      folder: of the results, with the parameters that were kept.
    """
    store = ResultsStore(folder)
    cells = kept_cells(store, "a transformer", "pos", attention="dot_product")
    cell = max(cells, key=lambda cell: (cell.updates, cell.n is None))
    if cell.task not in ("phones", "pos", "pos_fine"):
        raise ValueError(f"folder: there are no maps for task {cell.task!r}.")
    maps = (_utterance if cell.task == "phones" else _sentences)(store, cell)
    return dict(cell=cell.config(), maps=maps)


main = measures(MAPS, measure, indent=None)

if __name__ == "__main__":
    sys.exit(main())
