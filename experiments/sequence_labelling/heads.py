"""What each head of a trained tagger is for: what fails without it, where it looks.

`python -m experiments.sequence_labelling.heads FOLDER` takes the encoders of all seeds
that `--preset heads` (or `pos`) trained and kept in FOLDER, and writes heads.json,
which the report draws: accuracy by tag on the test part without each head in turn (its
output is zero), and how much of its weight lies on which offset.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.models import Labeller
from experiments.core.measure import Folder, measures
from experiments.core.store import ResultsStore
from experiments.data import sequence_tasks, sequences
from experiments.data.sequences import Part, SequenceData
from experiments.sequence_labelling.ablation import HEADS
from experiments.sequence_labelling.streaming import encoder_of, kept_cells, labeller_of
from experiments.tasks import labelling
from experiments.tasks.attention import weights_of

# Sentences of so many words are looked at, and offsets up to so many words.
LENGTH, REACH = 20, 8


@jax.jit
def _labels(
    model: Labeller, keep: jax.Array, inputs: jax.Array, real: jax.Array
) -> jax.Array:
    """Labels [B, T] of a model whose head n of layer l counts ``keep``[l, n] times."""
    for block, share in zip(encoder_of(model).blocks, keep, strict=True):
        kernel = block.attention.out.kernel
        kernel[...] = kernel[...] * share[:, None, None]
    return model(inputs, real).argmax(axis=-1)


def hits_by_label(
    model: Labeller, keep: np.ndarray, data: SequenceData, part: Part, tokens: int
) -> np.ndarray:
    """How many labels of each class are right.

    Args:
      model: a labeller whose body is a transformer of L layers of N heads.
      keep: [L, N], how often the output of each head counts: 1, or 0 without it.
      data: its task.
      part: what is labelled.
      tokens: labels a batch.

    Returns:
      int [classes].
    """
    found = np.zeros(len(data.class_names), int)
    for _, batch in sequences.in_order(part, data.lengths, tokens):
        real = batch.labels != sequences.IGNORED
        guess = np.asarray(_labels(model, jnp.asarray(keep), batch.inputs, real))
        right = batch.labels[real & (guess == batch.labels)]
        found += np.bincount(right, minlength=len(found))
    return found


def by_offset(weights: np.ndarray, reach: int) -> np.ndarray:
    """Mean weight that a query has for keys so many places after it.

    Args:
      weights: [B, N, T, T], rows are queries.
      reach: R, the farthest offset.

    Returns:
      [N, 2R + 1], for offsets −R … R; what is missing to 1 lies farther off.

    >>> by_offset(np.eye(3)[None, None], 1).tolist()
    [[0.0, 1.0, 0.0]]
    """
    found = [
        np.trace(weights, offset, axis1=2, axis2=3).mean(axis=0) / weights.shape[2]
        for offset in range(-reach, reach + 1)
    ]
    return np.stack(found, axis=-1)


def look(model: Labeller, data: SequenceData, part: Part, tokens: int) -> Any:
    """What heads.json says of one seed."""
    encoder = encoder_of(model)
    shape = len(encoder.blocks), encoder.blocks[0].attention.num_heads
    counts = np.bincount(
        np.concatenate(list(part.labels)), minlength=len(data.class_names)
    )

    def accuracies(keep: np.ndarray) -> dict[str, Any]:
        hits = hits_by_label(model, keep, data, part, tokens)
        by_tag = hits / np.maximum(counts, 1)
        return dict(accuracy=hits.sum() / counts.sum(), by_tag=by_tag.round(5).tolist())

    without: list[list[dict[str, Any]]] = [[] for _ in range(shape[0])]
    for layer, head in np.ndindex(shape):
        keep = np.ones(shape, np.float32)
        keep[layer, head] = 0.0
        without[layer].append(accuracies(keep))
    chosen = part.take(np.flatnonzero(part.lengths == LENGTH))
    x = model.input(jnp.asarray(np.stack(chosen.inputs)))
    offsets = [by_offset(w, REACH).round(4).tolist() for w in weights_of(encoder, x)]
    return dict(
        whole=accuracies(np.ones(shape, np.float32)),
        without=without,
        offsets=offsets,
        sentences=len(chosen),
        counts=counts.tolist(),
    )


def measure(folder: Folder) -> dict[str, Any]:
    """Every seed of the transformer that trained longest on the whole training part.

    Args:
      folder: of the results, with the parameters that were kept.
    """
    store = ResultsStore(folder)
    settings = dict(attention="dot_product", n=None)
    cells = kept_cells(store, "a transformer", "heads", seed=None, **settings)
    longest = max(cell.updates for cell in cells)
    cells = sorted(
        (cell for cell in cells if cell.updates == longest), key=lambda c: c.seed
    )
    data = sequence_tasks.load_task(cells[0].task)
    seeds = []
    for cell in cells:
        params = labelling.load_params(store, cell, data)
        model = labeller_of(cell, data, params, data.max_length)
        found = look(model, data, data.test, cell.tokens)
        print(f"seed {cell.seed}: accuracy {found['whole']['accuracy']:.4f}")
        seeds.append(dict(seed=cell.seed) | found)
    return dict(
        cell=cells[0].config(),
        tags=list(data.class_names),
        length=LENGTH,
        reach=REACH,
        seeds=seeds,
    )


main = measures(HEADS, measure, indent=None)

if __name__ == "__main__":
    sys.exit(main())
