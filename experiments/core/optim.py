"""The pure train step: a split module, AdamW with its schedule, state that moves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax.nn.attention_fn import AttentionState
from experiments.core.cell import Cell

PyTree = Any
Array = jax.Array | np.ndarray


class TrainState(NamedTuple):
    """All that a step changes, and the hyper-parameters that it reads.

    ``mean`` is what `final_params` are made of where ``averaged`` is among
    ``hyper.more``; else it is empty.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    hyper: Any
    mean: PyTree = ()


class Hyper(NamedTuple):
    """Numbers of a recipe that the compiled step takes as data, not as constants.

    Cells that differ in these alone share one compiled program. ``warmup`` is in
    updates; ``more`` is what a task adds, by name.
    """

    learning_rate: Array
    weight_decay: Array
    warmup: Array
    updates: Array
    clip_norm: Array
    more: dict[str, Array]


def hyper_of(cell: Cell, **more: Any) -> Hyper:
    """The recipe of a cell."""
    return recipe(
        learning_rate=cell.learning_rate,
        weight_decay=cell.weight_decay,
        warmup=max(1.0, cell.warmup * cell.updates),
        updates=cell.updates,
        clip_norm=cell.clip_norm,
        **more,
    )


def recipe(**numbers: Any) -> Hyper:
    """Numbers by name, as float32 arrays; those that `Hyper` does not name are more.

    >>> recipe(learning_rate=1e-3, weight_decay=0.0, warmup=1, updates=9, clip_norm=1,
    ...        mixup=0.5).more["mixup"].tolist()
    0.5
    """
    arrays: Any = {k: np.asarray(v, np.float32) for k, v in numbers.items()}
    own = {name: arrays.pop(name) for name in Hyper._fields if name != "more"}
    return Hyper(**own, more=arrays)


Apply = Callable[..., Any]
# What learns without a gradient: of attention, and statistics that layers of Flax keep.
MOVING = (AttentionState, nnx.BatchStat)
MOVED = "moved"  # the metric in which a loss hands on the state that its model moved


def split_model(model: nnx.Module) -> tuple[Apply, PyTree]:
    """Splits a module once into a pure ``apply(params, *inputs, rng=None)`` and params.

    ``params`` are nested dictionaries of arrays, by the names of the module's parts.
    What learns without a gradient (`MOVING`) stands among them, so that checkpoints,
    seeds and scores take it along.

    With ``rng`` the model runs in training mode: dropout is on, and a random
    attention variant draws anew from it. Without, in evaluation mode: all state other
    than parameters, random keys too, is as it was first.

    With ``mutable`` it returns ``(output, moved)``, the new state that learns without a
    gradient by the same names, for `move`; in evaluation mode, and without such state,
    ``moved`` is empty. ``apply.has_state`` says whether there is any.
    """
    graphdef, *states = nnx.split(model, (nnx.Param, *MOVING), ...)
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
            moved = nnx.to_pure_dict(nnx.state(module, MOVING))
        return (out, moved) if mutable else out

    apply.has_state = bool(nnx.to_pure_dict(nnx.state(model, MOVING)))  # type: ignore[attr-defined]
    return apply, params


def training_call(
    apply: Apply, params: PyTree, *inputs: Any, rng: jax.Array | None
) -> tuple[Any, PyTree]:
    """The model's output in training, and the state that it moved: for `move`."""
    if getattr(apply, "has_state", False):
        return apply(params, *inputs, rng=rng, mutable=True)
    return apply(params, *inputs, rng=rng), {}


def with_params(model: nnx.Module, params: PyTree) -> Any:
    """A module with trained parameters, as `split_model` gives them.

    >>> old, new = (nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    >>> taken = with_params(old, split_model(new)[1])
    >>> bool((taken.kernel[...] == new.kernel[...]).all())
    True
    """
    graphdef, *states = nnx.split(model, (nnx.Param, *MOVING), ...)
    variables, rest = states
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]  # kept as numpy
    variables = jax.tree.unflatten(jax.tree.structure(variables), leaves)
    return nnx.merge(graphdef, variables, rest)


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


def learning_rate(step: jax.Array, hyper: Any) -> jax.Array:
    """Linear warm-up to the peak, then a cosine to zero at ``hyper.updates``.

    With ``first_updates`` among ``hyper.more`` that happens twice: up to that update,
    and once more from there; each warms up for the same share of its updates.

    With ``noam`` among ``hyper.more`` it falls as 1 / √step behind the warm-up, and
    never to zero: with a peak of 1 / √(width · warm-up) that is the schedule of
    Vaswani et al., 2017, arXiv:1706.03762, equation 3.
    """
    step, updates, warmup = step.astype(jnp.float32), hyper.updates, hyper.warmup
    if "first_updates" in hyper.more:
        first = hyper.more["first_updates"]
        later = step >= first
        step = jnp.where(later, step - first, step)
        part = jnp.where(later, updates - first, first)
        updates, warmup = part, warmup * part / updates
    warm = (step + 1.0) / jnp.maximum(warmup, 1.0)
    if "noam" in hyper.more:
        return jnp.asarray(hyper.learning_rate) * jnp.minimum(warm, warm**-0.5)
    span = jnp.maximum(updates - warmup, 1.0)
    progress = jnp.clip((step - warmup) / span, 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.asarray(hyper.learning_rate) * jnp.minimum(warm, cosine)


def optimizer(hyper: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decay.

    What has two axes or more decays. Gains and biases do not, but for the biases of
    queries, keys and values, which Flax keeps as [heads, head size].

    With ``two_scales`` among ``hyper.more`` it is Adam without momentum, clipping and
    decay, for two players: what stands under "generator" in the parameters has that
    share of the learning rate (Heusel et al., 2017, arXiv:1706.08500).
    """
    if "two_scales" in hyper.more:
        share = hyper.more["two_scales"]
        return optax.chain(
            optax.scale_by_adam(b1=0.0, b2=0.9),
            optax.stateless(
                lambda updates, _: (
                    updates
                    | {
                        "generator": jax.tree.map(
                            lambda u: u * share, updates["generator"]
                        )
                    }
                )
            ),
            optax.scale_by_learning_rate(functools.partial(learning_rate, hyper=hyper)),
        )
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
    mean: PyTree = ()
    if "averaged" in hyper.more:
        mean = [jnp.zeros_like(x) for x in jax.tree.leaves(params) if _is_inexact(x)]
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer(hyper).init(params), hyper, mean
    )


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _averaged(state: TrainState) -> PyTree:
    """The mean of parameters, with those of this update if it is one of them."""
    hyper, params = state.hyper, jax.tree.leaves(state.params)
    if "averaged" not in hyper.more:
        return ()
    count = hyper.more["averaged"]
    apart = jnp.maximum(jnp.floor(hyper.updates / 100), 1.0)
    count = jnp.minimum(count, jnp.floor((hyper.updates - 1.0) / apart) + 1.0)
    left = hyper.updates - state.step.astype(jnp.float32)
    among = (left < count * apart) & (left % apart == 0)
    return [
        mean + jnp.where(among, x / count.astype(x.dtype), jnp.zeros_like(x))
        for mean, x in zip(state.mean, filter(_is_inexact, params), strict=True)
    ]


def final_params(state: TrainState) -> PyTree:
    """What training came to: the parameters, or a mean of the last ones.

    With ``averaged`` = k among ``hyper.more`` it is the mean of those after the last
    update and at k − 1 points before, a hundredth of all updates apart, as Vaswani et
    al., 2017, arXiv:1706.03762, average the last checkpoints; where training has fewer
    such points, about a hundred, it is the mean of those. What is no real number, such
    as a random key, is the last.
    """
    if "averaged" not in state.hyper.more:
        return state.params
    mean = iter(state.mean)
    return jax.tree.map(lambda x: next(mean) if _is_inexact(x) else x, state.params)


# loss_fn(params, batch, rng, hyper) -> (loss, metrics)
LossFn = Callable[[PyTree, Any, jax.Array, Any], tuple[jax.Array, dict[str, Any]]]
Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_step(loss_fn: LossFn) -> Step:
    """Returns the pure ``train_step(state, batch, rng) -> (state, metrics)``.

    Clipped AdamW with linear warm-up and a cosine to zero, see `optimizer`, whose
    numbers are in ``state.hyper``.

    Args:
      loss_fn: ``loss_fn(params, batch, rng, hyper)`` gives the loss and scalars by
        name. ``rng`` is the run's key with the number of the update folded in, so that
        a resumed run draws what an uninterrupted one would have drawn. The state that
        `training_call` returned as moved goes into the metrics under `MOVED`: the step
        takes it over into the parameters.

    Returns:
      The step; its metrics are those of ``loss_fn`` and "loss".
    """

    def train_step(
        state: TrainState, batch: Any, rng: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(rng, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, rng, state.hyper
        )
        with jax.numpy_dtype_promotion("standard"):  # Optax: float ** int
            updates, opt_state = optimizer(state.hyper).update(
                grads, state.opt_state, state.params
            )
        moved = metrics.pop(MOVED, {})
        params = move(optax.apply_updates(state.params, updates), moved)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        state = state._replace(mean=_averaged(state))
        return state, {"loss": loss, **metrics}

    return train_step
