"""Who attends to whom: attention maps of trained labellers on real input.

`python -m experiments.sequence_labelling.maps FOLDER` takes the encoder that
`--preset pos` or `--preset phones` trained and kept in FOLDER, writes its weights on
sentences such as "I saw a saw ." (or on an utterance of the test part) to maps.json,
and draws them as maps_*.png. With --redraw, figures are drawn from maps.json alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attn_jax._program import program
from attn_jax.nn.encoder import Encoder
from experiments.core import loop
from experiments.core.plots import save_figure
from experiments.core.run import ended_by
from experiments.core.store import ResultsStore, provenance
from experiments.data import sequence_tasks, speech, text
from experiments.sequence_labelling.streaming import cells_of, encoder_of, labeller_of
from experiments.tasks import labelling

SENTENCES = (
    "I saw a saw .",
    "They can fish near the fish can .",
    "The old man the boat .",
)

# Frames of an utterance that are drawn, and how many are averaged to one.
FRAMES, POOL = 240, 6


def weights_of(encoder: Encoder, x: jax.Array) -> list[np.ndarray]:
    """Attention weights of every block on one sequence.

    Args:
      encoder: any `Encoder` whose variant can give weights.
      x: [T, D], what the encoder gets.

    Returns:
      For each block [N, T, T], rows are queries and sum to one.
    """
    h = x[None]
    shared: Any = None
    if encoder.positions is not None:
        h = encoder.positions.embed(h)
        shared = encoder.positions.prepare(None, x.shape[0])
    found = []
    for block in encoder.blocks:
        normed = block.attention_norm(h)
        call = nnx.capture(
            lambda layer, normed=normed: layer(normed, mask=shared, sow_weights=True),
            nnx.Intermediate,
        )
        _, sown = call(block.attention)
        (weights,) = jax.tree.leaves(sown)
        found.append(np.asarray(weights)[0])
        h = block(h, shared)
    return found


def _best_cell(store: ResultsStore) -> labelling.LabelCell:
    """The kept transformer with dot-product attention that trained longest."""
    cells = [
        cell
        for cell in cells_of(store.records())
        if cell.attention == "dot_product" and loop.params_file(store, cell).is_file()
    ]
    if not cells:
        raise FileNotFoundError(
            f"{store.folder} holds no parameters of a transformer; first run `python "
            f"-m experiments.sequence_labelling --preset pos --out {store.folder}`."
        )
    return max(cells, key=lambda cell: (cell.updates, cell.n is None))


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
        weights = weights_of(encoder_of(model), model.input(ids[None])[0])
        maps.append(
            dict(
                title=sentence,
                ticks=[
                    f"{word}/{data.class_names[int(tag)]}"
                    for word, tag in zip(words, tags, strict=True)
                ],
                weights=[np.round(w.astype(np.float64), 3).tolist() for w in weights],
            )
        )
    return maps


def _utterance(store: ResultsStore, cell: labelling.LabelCell) -> list[dict[str, Any]]:
    data = sequence_tasks.phones("phones", speech.load_festvox_ru())
    params = labelling.load_params(store, cell, data)
    model = labeller_of(cell, data, params, data.max_length)
    x = jnp.asarray(data.test.inputs[0][:FRAMES])
    labels = data.test.labels[0][:FRAMES]
    weights = weights_of(encoder_of(model), model.input(x[None])[0])
    size = len(x) // POOL
    pooled = [
        w[:, : size * POOL, : size * POOL]
        .reshape(w.shape[0], size, POOL, size, POOL)
        .mean(2)
        .sum(3)
        for w in weights
    ]
    names = [data.class_names[int(y)] for y in labels[: size * POOL : POOL]]
    ticks = [
        name if i == 0 or name != names[i - 1] else "" for i, name in enumerate(names)
    ]
    return [
        dict(
            title=f"utterance, {10 * POOL} ms a cell",
            ticks=ticks,
            weights=[np.round(w.astype(np.float64), 3).tolist() for w in pooled],
        )
    ]


def draw(maps: Sequence[dict[str, Any]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws one figure a sequence: a row a layer, a column a head."""
    paths = []
    for number, entry in enumerate(maps):
        weights = [np.asarray(w) for w in entry["weights"]]
        layers, heads = len(weights), weights[0].shape[0]
        figure = Figure(
            figsize=(2.6 * heads + 0.8, 2.6 * layers + 0.8),
            dpi=90,
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(layers, heads, squeeze=False)
        for layer in range(layers):
            for head in range(heads):
                ax = axes[layer][head]
                ax.imshow(weights[layer][head], cmap="magma", vmin=0)
                ax.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
                places = [i for i, name in enumerate(entry["ticks"]) if name]
                shown = [entry["ticks"][i] for i in places]
                ax.set_xticks(
                    places if layer == layers - 1 else [],
                    shown if layer == layers - 1 else [],
                    rotation=90,
                    fontsize=6,
                )
                ax.set_yticks(
                    places if head == 0 else [], shown if head == 0 else [], fontsize=6
                )
        figure.suptitle(f"{entry['title']}  (rows attend to columns)", fontsize=10)
        paths.append(save_figure(figure, folder / f"maps_{number + 1}.png"))
    return paths


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Writes maps.json and draws it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--redraw", action="store_true", help="from maps.json alone")
    options = parser.parse_args(argv)
    path = options.folder / "maps.json"
    try:
        if not options.redraw:
            store = ResultsStore(options.folder)
            cell = _best_cell(store)
            if cell.task not in ("phones", "pos", "pos_fine"):
                raise ValueError(f"folder: there are no maps for task {cell.task!r}.")
            spoken = cell.task == "phones"
            maps = _utterance(store, cell) if spoken else _sentences(store, cell)
            found = dict(cell=cell.config(), maps=maps, provenance=provenance())
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        for file in draw(found["maps"], options.folder):
            print(f"-> {file}")
    except Exception as error:
        return ended_by(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
