"""Training as pure functions on pytrees: loss, step, evaluation, sharding.

Nothing here reads a file or a clock. `train_step(state, batch, rng)` is what jit,
vmap over seeds and a mesh of devices take as it is; `experiments.core.loop` drives
it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn_jax.nn.attention_fn import AttentionState

PyTree = Any


Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """Images uint8 [B, height, width, C] and labels int32 [B]."""

    image: Array
    label: Array


class Hyper(NamedTuple):
    """Numbers of a recipe that the compiled step takes as data, not as constants.

    Cells that differ in these alone share one compiled program.
    """

    learning_rate: Array
    weight_decay: Array
    warmup: Array
    updates: Array
    label_smoothing: Array
    mixup: Array
    clip_norm: Array
    pixel_mean: Array
    pixel_std: Array


class TrainState(NamedTuple):
    """All that a step changes, and the hyper-parameters that it reads."""

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    hyper: Any


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is done to training images; each choice compiles its own program.

    Attributes:
      flip: mirror left-right with probability 1/2.
      crop: pad by so many pixels and cut at a random offset; 0 = off.
      mixup: blend pairs of images and labels, λ ~ Beta(α, α), α in `Hyper.mixup`
        (Zhang et al., arXiv:1710.09412).
      dropout: pass an rng to the model, for dropout or random attention. (One that
        has an `AttentionState` gets it anyway.)
    """

    flip: bool = False
    crop: int = 0
    mixup: bool = False
    dropout: bool = False


Apply = Callable[..., Any]
MOVED = "moved"  # the metric in which a loss hands on the state that its model moved


def split_model(model: nnx.Module) -> tuple[Apply, PyTree]:
    """Splits a module once into a pure ``apply(params, *inputs, rng=None)`` and params.

    ``params`` are nested dictionaries of arrays, by the names of the module's parts.
    What learns without a gradient, an `AttentionState`, stands among them, so that
    checkpoints, seeds and scores take it along.

    With ``rng`` the model runs in training mode: dropout is on, and a random
    attention variant draws anew from it. Without, in evaluation mode: all state other
    than parameters, random keys too, is as it was first.

    With ``mutable`` it returns ``(output, moved)``, the new `AttentionState` by the
    same names, for `move`; in evaluation mode, and without such state, ``moved`` is
    empty. ``apply.has_state`` says whether there is any.
    """
    graphdef, *states = nnx.split(model, (nnx.Param, AttentionState), ...)
    variables, rest = states
    treedef = jax.tree.structure(variables)
    # Plain dictionaries: jit takes them apart in C++ at every step, Flax's variables
    # in Python.
    params = nnx.to_pure_dict(variables)
    leaves = jax.tree.leaves(variables)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), leaves, strict=True))

    def apply(
        params: PyTree,
        *inputs: Any,
        rng: jax.Array | None = None,
        mutable: bool = False,
    ) -> Any:
        params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        if rng is None:
            module = nnx.merge(graphdef, params, rest)
            out, moved = module(*inputs, deterministic=True), {}
        else:
            module = nnx.merge(graphdef, params, redraw(rest, rng))
            out = module(*inputs, deterministic=False, rngs=nnx.Rngs(dropout=rng))
            moved = nnx.to_pure_dict(nnx.state(module, AttentionState))
        return (out, moved) if mutable else out

    apply.has_state = bool(nnx.to_pure_dict(nnx.state(model, AttentionState)))  # type: ignore[attr-defined]
    return apply, params


def training_call(
    apply: Apply, params: PyTree, *inputs: Any, rng: jax.Array | None
) -> tuple[Any, PyTree]:
    """The model's output in training, and the state that it moved: for `move`."""
    if getattr(apply, "has_state", False):
        return apply(params, *inputs, rng=rng, mutable=True)
    return apply(params, *inputs, rng=rng), {}


def move(params: PyTree, moved: PyTree) -> PyTree:
    """Parameters after an update, with the state that ``apply`` returned as moved.

    >>> move({"a": {"kernel": 1, "centroid": 2}, "b": 3}, {"a": {"centroid": 4}})
    {'a': {'kernel': 1, 'centroid': 4}, 'b': 3}
    """
    if not isinstance(params, dict):
        return moved
    return {k: move(x, moved[k]) if k in moved else x for k, x in params.items()}


def redraw(state: PyTree, rng: jax.Array) -> PyTree:
    """Replaces every random key in a pytree by one folded from ``rng``, each its own.

    >>> keys = {"a": jax.random.key(0), "b": jax.random.key(0), "c": jnp.zeros(2)}
    >>> drawn = redraw(keys, jax.random.key(1))
    >>> bool(drawn["a"] == drawn["b"]), drawn["c"].tolist()
    (False, [0.0, 0.0])
    """
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.fold_in(rng, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
            for i, leaf in enumerate(leaves)
        ],
    )


def learning_rate(step: jax.Array, hyper: Hyper) -> jax.Array:
    """Linear warm-up to the peak, then a cosine to zero at ``hyper.updates``."""
    step = step.astype(jnp.float32)
    warm = (step + 1.0) / jnp.maximum(hyper.warmup, 1.0)
    span = jnp.maximum(hyper.updates - hyper.warmup, 1.0)
    progress = jnp.clip((step - hyper.warmup) / span, 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.asarray(hyper.learning_rate) * jnp.minimum(warm, cosine)


def optimizer(hyper: Hyper) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decay.

    What has two axes or more decays. Gains and biases do not, but for the biases of
    queries, keys and values, which Flax keeps as [heads, head size].
    """
    return optax.chain(
        optax.clip_by_global_norm(hyper.clip_norm),
        optax.adamw(
            functools.partial(learning_rate, hyper=hyper),
            weight_decay=hyper.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def init_state(params: PyTree, hyper: Any) -> TrainState:
    """The state before the first update."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer(hyper).init(params), hyper
    )


def normalize(images: Array, hyper: Hyper) -> jax.Array:
    """Pixels 0..255 to float32 of mean 0 and deviation 1 on the training subset."""
    pixels = jnp.asarray(images).astype(jnp.float32) / 255.0
    return (pixels - _channels(hyper.pixel_mean)) / _channels(hyper.pixel_std)


def _channels(x: Array) -> jax.Array:
    """[C] as [1, 1, 1, C]."""
    return jax.lax.expand_dims(x, (0, 1, 2))


def augment(
    images: jax.Array, labels: jax.Array, rng: jax.Array, hyper: Hyper, choice: Augment
) -> tuple[jax.Array, jax.Array]:
    """Augments normalised images [B, h, w, C] and one-hot labels [B, classes]."""
    flip_rng, crop_rng, lam_rng, pair_rng = jax.random.split(rng, 4)
    batch, height, width, channels = images.shape
    if choice.flip:
        flipped = jax.random.bernoulli(flip_rng, 0.5, (batch, 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if choice.crop:
        pad = choice.crop
        dark = _channels((0.0 - hyper.pixel_mean) / hyper.pixel_std)
        padded = jnp.pad(images - dark, ((0, 0), (pad, pad), (pad, pad), (0, 0))) + dark
        corner = jax.random.randint(crop_rng, (batch, 2), 0, 2 * pad + 1)
        images = jax.vmap(
            lambda image, at: jax.lax.dynamic_slice(
                image, (at[0], at[1], 0), (height, width, channels)
            )
        )(padded, corner)
    if choice.mixup:
        lam = jax.random.beta(lam_rng, hyper.mixup, hyper.mixup)
        pair = jax.random.permutation(pair_rng, batch)
        images = lam * images + (1.0 - lam) * images[pair]
        labels = lam * labels + (1.0 - lam) * labels[pair]
    return images, labels


def make_train_step(
    apply: Apply, num_classes: int, choice: Augment
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the pure ``train_step(state, batch, rng) -> (state, metrics)``.

    ``rng`` is the run's key; the step's own is folded from it and the step number,
    so that a resumed run draws what an uninterrupted one would have drawn.
    """

    def train_step(
        state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        hyper = state.hyper
        augment_rng, dropout_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        images = normalize(batch.image, hyper)
        labels = jax.nn.one_hot(batch.label, num_classes, dtype=jnp.float32)
        images, labels = augment(images, labels, augment_rng, hyper, choice)
        labels = (
            labels * (1.0 - hyper.label_smoothing) + hyper.label_smoothing / num_classes
        )

        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            trains = choice.dropout or getattr(apply, "has_state", False)
            logits, moved = training_call(
                apply, params, images, rng=dropout_rng if trains else None
            )
            logits = logits.astype(jnp.float32)
            loss = optax.softmax_cross_entropy(logits, labels).mean()
            return loss, (logits, moved)

        graded = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, moved)), grads = graded(state.params)
        with jax.numpy_dtype_promotion("standard"):  # Optax: float ** int
            updates, opt_state = optimizer(hyper).update(
                grads, state.opt_state, state.params
            )
        params = move(optax.apply_updates(state.params, updates), moved)
        hits = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        metrics = {"loss": loss, "accuracy": jnp.mean(hits.astype(jnp.float32))}
        return TrainState(state.step + 1, params, opt_state, hyper), metrics

    return train_step


def make_eval_step(
    apply: Apply,
) -> Callable[[TrainState, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns ``eval_step(state, batch, valid[B]) -> (hits, summed loss)``."""

    def eval_step(
        state: TrainState, batch: Batch, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = apply(state.params, normalize(batch.image, state.hyper))
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
        hits = (jnp.argmax(logits, -1) == batch.label).astype(jnp.float32)
        return jnp.sum(hits * valid), jnp.sum(loss * valid)

    return eval_step


# ------------------------------------------------------------------ batches


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def batch_positions(n: int, *, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Positions 0..n-1 of the examples of one step, a pure function of its arguments.

    Epochs are permutations laid end to end, so every example occurs equally often
    (± 1) and a batch may cross from one epoch into the next.

    >>> batch_positions(4, seed=0, step=0, batch_size=4).tolist() == sorted(range(4))
    False
    >>> sorted(batch_positions(4, seed=0, step=5, batch_size=4).tolist())
    [0, 1, 2, 3]
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        low = max(start - epoch * n, 0)
        high = min(stop - epoch * n, n)
        parts.append(_permutation(seed, epoch, n)[low:high])
    return np.concatenate(parts)


# ----------------------------------------------------------------- devices


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh, axis "data", over all devices of all processes."""
    return Mesh(np.asarray(devices or jax.devices()), ("data",))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of a cluster share a batch evenly.

    Those of one process share any batch, see `place_batch`.
    """
    if jax.process_count() > 1 and batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the number of devices, got "
            f"{batch_size} for {mesh.size} devices."
        )


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Places host arrays on a mesh, split along their leading axis where it is even.

    Else every device has all of it, and `shared` splits it inside the program.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    return put(batch, mesh, *(() if size % mesh.size else ("data",)))


@functools.lru_cache(maxsize=64)
def shared(
    function: Callable[..., Any], mesh: Mesh, donate: int | None = None
) -> Callable[..., Any]:
    """``function(state, batch, ...)`` for a batch that devices cannot share evenly.

    XLA fills it up with rows that count nothing, so that no number depends on how many
    devices there are, but for rounding.

    Args:
      function: compiled; its second argument has a leading axis to split.
      mesh: the devices.
      donate: an argument whose memory the result takes over.
    """
    split = NamedSharding(mesh, PartitionSpec("data"))

    def shared(state: Any, batch: Any, *rest: Any) -> Any:
        return function(state, jax.lax.with_sharding_constraint(batch, split), *rest)

    return jax.jit(shared, donate_argnums=() if donate is None else donate)


def on_mesh(
    function: Callable[..., Any], batch: PyTree, mesh: Mesh, donate: int | None = None
) -> Callable[..., Any]:
    """The function that takes this batch, as `place_batch` placed it: see `shared`."""
    size = jax.tree.leaves(batch)[0].shape[0]
    return shared(function, mesh, donate) if size % mesh.size else function


def all_finite(tree: PyTree) -> bool:
    """Whether no number in a tree of arrays is infinite or none."""
    return all(
        bool(np.isfinite(np.asarray(leaf)).all())
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


def put(value: PyTree, mesh: Mesh, *axes: str | None) -> PyTree:
    """Places host arrays on a mesh, split along named axes, else replicated.

    Every process passes the whole value; each device keeps its part.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*axes))

    def one(x: Any) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(
            host.shape, sharding, lambda index: host[index]
        )

    return jax.tree.map(one, value)
