"""What a function gives each query of each value: measured, whatever the function."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.positions import sinusoidal_1d
from attn_jax.variant import Variant

__all__ = ["arrays_of", "heat_map", "save_png", "vectors_of", "weights"]

_SHADES = " ░▒▓█"


def weights(
    variant: Variant,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    seed: int = 0,
    is_causal: bool = False,
) -> jax.Array:
    """What d output[t, 0] / d value[s, 0] is: the weights of a weighted sum.

    So no function has to give its weights out: softmax attention gives its softmax,
    linear attention what its sums come to, and what is not linear in its values, or
    mixes their channels, the slope at these.

    Args:
      variant: with its options bound; parameters are as its `init` makes them.
      query, key, value: [T, H], [S, H], [S, V].
      seed: of parameters, and of what a random function draws.
      is_causal: whether queries see nothing after themselves.

    Returns:
      [T, S] of float32.

    Raises:
      ValueError: the variant cannot be causal, or not take these shapes.

    >>> from attn_jax import VARIANTS
    >>> x = jnp.zeros((2, 4))
    >>> weights(VARIANTS["dot_product"], x, x, x, is_causal=True).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    longest = max(len(query), len(key))
    variant = variant.fit(max_length=longest, value_dim=value.shape[1])
    of_params, of_draws = jax.random.split(jax.random.key(seed))
    given: dict[str, Any] = {}
    if variant.needs("params"):
        given["params"] = variant.make(of_params, query.shape[1])
    if variant.needs("rng"):
        given["rng"] = of_draws
    if is_causal:
        if not variant.causal:
            raise ValueError(f"is_causal: {variant.name!r} has no causal form.")
        given["is_causal"] = True

    def first(channel: jax.Array) -> jax.Array:
        return variant.fn(query, key, value.at[:, 0].set(channel), **given)[:, 0]

    return jax.jit(jax.jacrev(first))(value[:, 0]).astype(jnp.float32)


def vectors_of(words: Sequence[str], dim: int = 32, positions: bool = True) -> Any:
    """A vector for each word: a word has the same one wherever it is, of length √dim.

    Args:
      words: any texts.
      dim: length of the vectors.
      positions: whether sinusoids of the places are added.

    Returns:
      [T, dim] of float32.

    >>> x = vectors_of(["I", "saw", "a", "saw"], positions=False)
    >>> bool((x[1] == x[3]).all()), round(float(x[0] @ x[0]))
    (True, 32)
    """

    def one(word: str) -> np.ndarray:
        drawn = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(dim)
        return drawn * np.sqrt(dim) / np.linalg.norm(drawn)

    drawn = jnp.asarray(np.stack([one(word) for word in words]), jnp.float32)
    return drawn + sinusoidal_1d(len(words), dim) if positions else drawn


def arrays_of(path: pathlib.Path) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query [T, H], key [S, H] and value [S, V] of an `.npz` file.

    Without `key` the queries are the keys, without `value` the keys the values.

    Raises:
      ValueError: the file has no `query`, or an array has not two axes.
    """
    with np.load(path, allow_pickle=False) as file:
        found: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
    if "query" not in found:
        raise ValueError(
            f"{path}: an array `query` [T, H] is needed, it has {', '.join(found)}."
        )
    query = found["query"]
    key = found.get("key", query)
    made = dict(query=query, key=key, value=found.get("value", key))
    for name, array in made.items():
        if array.ndim != 2:
            raise ValueError(f"{path}: {name} must have two axes, got {array.shape}.")
    one, two, three = (jnp.asarray(x, jnp.float32) for x in made.values())
    return one, two, three


def heat_map(
    weights: Any,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> str:
    """Weights [T, S] as shades, darkest at the largest; negative ones are marked "-".

    >>> print(heat_map(jnp.array([[1.0, 0.0], [0.5, 0.5]]), ["I", "saw"], ["I", "saw"]))
         I    saw
    I    ████     1.00
    saw  ▒▒▒▒ ▒▒▒▒ 0.50
    """
    found = np.asarray(weights, np.float32)
    count, width = found.shape
    rows = [str(t) for t in range(count)] if rows is None else rows
    columns = [str(s) for s in range(width)] if columns is None else columns
    top = max(float(np.abs(found).max(initial=0.0)), 1e-30)
    named, cell = max(map(len, rows), default=0), 4 if width <= 24 else 1
    lines = []
    if cell > 1:
        heads = " ".join(name[:cell].ljust(cell) for name in columns)
        lines.append(f"{'':{named}}  {heads}".rstrip())
    for name, row in zip(rows, found, strict=True):
        shown = [
            "-" * cell
            if value < -top / 8
            else _SHADES[round(max(float(value), 0.0) / top * (len(_SHADES) - 1))]
            * cell
            for value in row
        ]
        joined = (" " if cell > 1 else "").join(shown)
        lines.append(f"{name:{named}}  {joined} {row.max():.2f}")
    return "\n".join(lines)


def save_png(
    weights: Any,
    path: pathlib.Path,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Weights [T, S] as a picture with a scale.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "png: Matplotlib is not installed; pip install 'attn-jax[experiments]'."
        ) from error
    found = np.asarray(weights, np.float32)
    figure = Figure(figsize=(5.2, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low = min(float(found.min(initial=0.0)), 0.0)
    image = axes.imshow(found, cmap="Blues" if low == 0 else "RdBu", vmin=low)
    figure.colorbar(image, label="weight")
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        if names is not None:
            axis.set_ticks(range(len(names)), names)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("key s")
    axes.set_ylabel("query t")
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, format="png", metadata={"Software": None})
