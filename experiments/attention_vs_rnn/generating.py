"""How fast decoders generate: images a second, tokens, and the lead over the length.

`python -m experiments.attention_vs_rnn.generating FOLDER` writes generating.json, which
the report reads: images a second without a state, with a key-value cache, written in
place or copied for every token, and with recurrent states; the lead of linear attention
over a cache as the length grows; and the time of a token by its position. Weights are
untrained: no time depends on them. Times are medians on one core, of the processor's
time, which other programs on the machine do not lengthen.
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attention_vs_rnn.cells import program_of
from experiments.attention_vs_rnn.data import START
from experiments.attention_vs_rnn.logistic_mixture import logistic_mixture_sample
from experiments.attention_vs_rnn.speed import GENERATING
from experiments.attention_vs_rnn.timing import CLOCK, shape_of
from experiments.core.engine import available_cores
from experiments.core.measure import Folder, measures, median_of, one_core, seconds_of

# The paper's model of MNIST: 8 layers, 8 heads of 32, 784 pixels, 10 logistics.
PAPER_MODEL = dict(length=784, dim=256, depth=8, num_heads=8, components=10, height=28)
SMALL_MODEL = dict(length=16, dim=16, depth=1, num_heads=2, components=2, height=4)

# Sizes of a picture, rows and columns, over which the lead of linear attention is told;
# up to the second number of pixels whole ones are drawn.
GROWTH = ((28, 28), (28, 56), (64, 192)), 1_568
SMALL_GROWTH = ((2, 4), (4, 4)), 8


def _model(model: str, sizes: Mapping[str, Any]) -> tuple[int, Any, Any]:
    """Length, functions and parameters of an untrained model."""
    shape = shape_of(model, sizes)
    program = program_of(shape)
    return shape.length, program.more["functions"], program.initial_params(0)


def whole_images(
    models: Sequence[str], sizes: Mapping[str, Any], batch: int, repeats: int
) -> list[dict[str, Any]]:
    """Images a second with a state, all pixels drawn; the models take turns."""
    calls = []
    for model in models:
        length, functions, params = _model(model, sizes)
        start = jnp.full((batch, 1), START, jnp.int32)

        def draw(
            params: Any,
            start: jax.Array,
            rng: jax.Array,
            functions: Any = functions,
            length: int = length,
        ) -> jax.Array:
            return functions.generate(
                params, start, length, rng, logistic_mixture_sample
            )

        operands = (params, start, jax.random.key(0))
        compiled = jax.jit(draw).lower(*operands).compile()
        calls.append(functools.partial(compiled, *operands))
    # Long enough not to need a call that does not count.
    turns = [
        [seconds_of(call, 1, warm=False, clock=CLOCK)[0] for call in calls]
        for _ in range(repeats)
    ]
    found = []
    for model, *seconds in zip(models, *turns, strict=True):
        speed = batch / statistics.median(seconds)
        row = dict(model=model, batch=batch, length=sizes["length"], seconds=seconds)
        found.append(row | dict(images_per_s=speed))
        print(f"{model} x {batch}, {row['length']} pixels: {speed:.4f} images/s")
    return found


def uncached_images(
    sizes: Mapping[str, Any], batch: int, lengths: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Images a second where every pixel needs a forward pass over all before it.

    The pass is timed at some lengths; between them time is taken to be linear, and
    below the first in proportion to the length.
    """
    whole, functions, params = _model("softmax", sizes)

    def one(params: Any, tokens: jax.Array) -> jax.Array:
        outputs = functions.apply(params, tokens)
        return logistic_mixture_sample(jax.random.key(0), outputs[:, -1])

    points = []
    compiled = jax.jit(one)
    for length in lengths:
        tokens = jnp.full((batch, length), START, jnp.int32)
        call = lambda tokens=tokens: compiled(params, tokens)  # noqa: E731
        points.append(median_of(call, repeats, clock=CLOCK))
    places = np.arange(1, whole + 1)
    total = float(np.interp(places, [0, *lengths], [0.0, *points]).sum())
    return dict(
        model="softmax, uncached",
        batch=batch,
        lengths=list(lengths),
        seconds_at=points,
        seconds=[total],
        images_per_s=batch / total,
    )


def by_position(
    model: str,
    sizes: Mapping[str, Any],
    batch: int,
    positions: Sequence[int],
    repeats: int,
    *,
    in_place: bool = True,
) -> list[float]:
    """Median seconds of a step at some positions of a sequence.

    Args:
      model: which.
      sizes: of it.
      batch: sequences at once.
      positions: the tokens that are timed, in turns.
      repeats: of each.
      in_place: whether a step may write into the state that it is given; otherwise it
        writes all of it anew, as code does that joins a token to a cache.
    """
    length, functions, params = _model(model, sizes)

    def one(params: Any, state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        state, output = functions.step(params, state, token)
        return state, logistic_mixture_sample(jax.random.key(0), output)

    step = jax.jit(one, donate_argnums=1 if in_place else ())
    state = jax.jit(lambda: functions.init(batch, length))()
    token = jnp.full((batch,), START, jnp.int32)
    seconds: dict[int, list[float]] = {position: [] for position in positions}
    for turn in range(repeats + 1):
        for position in positions:
            state = state._replace(position=jnp.asarray(position, jnp.int32))
            jax.block_until_ready(state)
            began = CLOCK()
            state, drawn = step(params, state, token)
            jax.block_until_ready((state, drawn))
            if turn:
                seconds[position].append(CLOCK() - began)
    return [statistics.median(found) for found in seconds.values()]


def growth(
    pictures: tuple[Sequence[tuple[int, int]], int],
    sizes: Mapping[str, Any],
    repeats: int,
    steps: int,
) -> dict[str, Any]:
    """Softmax attention with a cache and linear attention over the length, one image.

    Args:
      pictures: rows and columns, rising, and the most pixels that are drawn whole.
      sizes: of the models but for these.
      repeats: of whole images.
      steps: of a token at each position.

    Returns:
      "images", rows as of `whole_images`; and "tokens", seconds of a token at positions
      of the longest sequence.
    """
    shapes, most = pictures
    models = ("softmax", "linear")
    images = []
    for height, width in shapes:
        sizes = dict(sizes, height=height, length=height * width)
        if sizes["length"] <= most:
            images += whole_images(models, sizes, 1, repeats)
    positions = [0, *(height * width - 1 for height, width in shapes)]
    tokens = {m: by_position(m, sizes, 1, positions, steps) for m in models}
    return dict(images=images, tokens=dict(positions=positions, seconds=tokens))


def measure(
    folder: Folder = pathlib.Path("runs/attention_vs_rnn/cpu"), *, smoke: bool = False
) -> dict[str, Any]:
    """Times the generation of images.

    Args:
      folder: of the results.
      smoke: tiny sizes, as a test of the program.
    """
    if not smoke:
        one_core()
    sizes: dict[str, Any] = dict(SMALL_MODEL if smoke else PAPER_MODEL)
    length = sizes["length"]
    batches = (2,) if smoke else (1, 16)
    repeats, steps = (1, 2) if smoke else (3, 15)
    eighths = [max(1, length * i // 7) for i in range(1, 8)]
    models = ("softmax", "linear", "lstm")
    images = [
        row for batch in batches for row in whole_images(models, sizes, batch, repeats)
    ]
    images.append(uncached_images(sizes, batches[0], eighths[::3], repeats))
    positions = [0, *(n - 1 for n in eighths)]
    last = batches[-1]
    tokens = {m: by_position(m, sizes, last, positions, steps) for m in models}
    copied = []
    for batch in batches:
        given = ("softmax", sizes, batch, positions[::7], steps)
        seconds = by_position(*given, in_place=False)
        copied.append(dict(batch=batch, positions=positions[::7], seconds=seconds))
    return dict(
        sizes=sizes,
        images=images,
        copied=copied,
        growth=growth(SMALL_GROWTH if smoke else GROWTH, sizes, repeats, steps),
        tokens=dict(positions=positions, batch=last, seconds=tokens),
        cores=len(available_cores()),
        clock="processor",
    )


main = measures(GENERATING, measure)

if __name__ == "__main__":
    sys.exit(main())
