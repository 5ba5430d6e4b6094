from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

from attn_jax.models import build
from experiments.core import devices, loop, optim
from experiments.tasks import images as tasks
from experiments.tasks.images import Augment, Batch


def hyper(**more):
    numbers = dict(
        learning_rate=0.1, weight_decay=0.0, warmup=1.0, updates=10,
        label_smoothing=0.0, mixup=0.2, clip_norm=np.inf,
    ) | more  # fmt: skip
    return optim.recipe(
        **numbers, pixel_mean=np.array([0.5]), pixel_std=np.array([0.25])
    )


def step_fn(apply, classes, choice):
    return optim.make_step(tasks.image_loss(apply, classes, choice))


def linear(params, images, rng=None):
    flat = images.reshape(images.shape[0], -1)
    return flat @ params["kernel"] + params["bias"][None]


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = dict(
        kernel=jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), bias=jnp.zeros(3)
    )
    images = rng.integers(0, 256, (6, 2, 2, 1)).astype(np.uint8)
    return params, Batch(jnp.asarray(images), jnp.arange(6, dtype=jnp.int32) % 3)


def step_of(params, batch, numbers, choice=Augment(), steps=1):  # noqa: B008
    step = jax.jit(step_fn(linear, 3, choice))
    state = optim.init_state(params, numbers)
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(0))
    return state, metrics


def adamw_by_hand(params, batch, *, rate, decay, clip, smoothing):
    """One step in float64, from the equations."""
    x = (np.asarray(batch.image, np.float64).reshape(6, -1) / 255 - 0.5) / 0.25
    kernel, bias = (np.asarray(params[k], np.float64) for k in ("kernel", "bias"))
    target = np.eye(3)[np.asarray(batch.label)] * (1 - smoothing) + smoothing / 3
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.sum(target * np.log(p)) / 6
    grads = dict(kernel=x.T @ (p - target) / 6, bias=(p - target).sum(0) / 6)
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    out = {}
    for name, value in dict(kernel=kernel, bias=bias).items():
        g = grads[name] * min(1.0, clip / norm)
        m, v = 0.1 * g / (1 - 0.9), 0.001 * g**2 / (1 - 0.999)
        shrink = decay * value if value.ndim > 1 else 0.0
        out[name] = value - rate * (m / (np.sqrt(v) + 1e-8) + shrink)
    return out, loss


def test_a_step_is_clipped_adamw_on_the_smoothed_loss(problem):
    params, batch = problem
    numbers = hyper(weight_decay=0.3, label_smoothing=0.2, clip_norm=1e-7)
    state, metrics = step_of(params, batch, numbers)
    expected, loss = adamw_by_hand(
        params, batch, rate=0.1, decay=0.3, clip=1e-7, smoothing=0.2
    )
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    for name in expected:
        np.testing.assert_allclose(state.params[name], expected[name], atol=1e-5)
    assert state.step == 1
    # Clipping matters: gradients near ε are not normalised away by Adam.
    free, _ = step_of(params, batch, hyper(weight_decay=0.3, label_smoothing=0.2))
    assert not np.allclose(free.params["bias"], expected["bias"], atol=1e-3)


def test_the_schedule_is_that_of_optax():
    numbers = hyper(warmup=4, updates=20)
    found = [optim.learning_rate(jnp.int32(k), numbers) for k in range(20)]
    assert np.allclose(found[:4], [0.025, 0.05, 0.075, 0.1])  # the first step counts
    cosine = optax.cosine_decay_schedule(0.1, 16)
    assert np.allclose(found[4:], [cosine(k) for k in range(16)])
    assert float(optim.learning_rate(jnp.int32(20), numbers)) == 0


def test_a_schedule_may_begin_anew():
    both = optim.recipe(
        learning_rate=2.0, weight_decay=0, warmup=3, updates=30, clip_norm=1,
        first_updates=10,
    )  # fmt: skip
    for begin, updates in ((0, 10), (10, 20)):
        alone = optim.recipe(
            learning_rate=2.0, weight_decay=0, warmup=updates / 10, updates=updates,
            clip_norm=1,
        )  # fmt: skip
        for k in range(updates):
            got = optim.learning_rate(jnp.int32(begin + k), both)
            want = optim.learning_rate(jnp.int32(k), alone)
            assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_noam_is_the_schedule_of_the_paper():
    width, warmup = 64, 10
    numbers = optim.recipe(
        learning_rate=(width * warmup) ** -0.5, weight_decay=0, warmup=warmup,
        updates=40, clip_norm=1, noam=1,
    )  # fmt: skip
    steps = np.arange(1, 61)
    paper = width**-0.5 * np.minimum(steps**-0.5, steps * warmup**-1.5)
    found = [optim.learning_rate(jnp.int32(step - 1), numbers) for step in steps]
    np.testing.assert_allclose(found, paper, rtol=1e-5)


def test_the_last_parameters_are_averaged_where_that_is_asked_for(problem):
    params, batch = problem

    def loss(params, batch, rng, hyper):
        logits = linear(params, jnp.asarray(batch.image, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch.label
        ).mean(), {}

    step, passed = jax.jit(optim.make_step(loss)), []
    # Too slow to be done, the highest rate last: the last updates still move.
    numbers = hyper(learning_rate=0.001, updates=250, warmup=250, averaged=3, noam=1.0)
    state = optim.init_state(params, numbers)
    for _ in range(250):
        state, _ = step(state, batch, jax.random.key(0))
        passed.append(state.params)
    # A hundredth of 250 updates is two.
    kernels = [passed[at - 1]["kernel"] for at in (246, 248, 250)]
    found = optim.final_params(state)
    assert np.abs(kernels[2] - passed[248]["kernel"]).max() > 1e-4
    np.testing.assert_allclose(found["kernel"], np.mean(kernels, axis=0), atol=1e-6)
    # Where fewer points are passed than are asked for, they are the mean.
    state, every = optim.init_state(params, hyper(updates=9, averaged=150)), []
    for _ in range(9):
        state, _ = step(state, batch, jax.random.key(0))
        every.append(state.params["kernel"])
    kernel = optim.final_params(state)["kernel"]
    np.testing.assert_allclose(kernel, np.mean(every, axis=0), atol=1e-6)
    plain = optim.init_state(params, hyper())
    assert plain.mean == () and optim.final_params(plain) is plain.params


def test_pixels_are_scaled_by_the_statistics_of_the_subset():
    images = jnp.array([0, 255], jnp.uint8).reshape(1, 2, 1, 1)
    np.testing.assert_allclose(tasks.normalize(images, hyper()).ravel(), [-2.0, 2.0])


def augmented(choice, seed=0, count=64):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(count, 6, 6, 1)), jnp.float32)
    labels = jax.nn.one_hot(jnp.arange(count) % 3, 3, dtype=jnp.float32)
    call = jax.jit(tasks.augment, static_argnums=4)
    out = call(images, labels, jax.random.key(seed), hyper(), choice)
    return np.asarray(images), np.asarray(labels), *map(np.asarray, out)


def test_flips_mirror_about_half_of_the_images():
    images, labels, out, same = augmented(Augment(flip=True))
    flipped = np.all(out == images[:, :, ::-1], (1, 2, 3))
    kept = np.all(out == images, (1, 2, 3))
    assert np.all(flipped ^ kept) and 16 < flipped.sum() < 48
    np.testing.assert_array_equal(labels, same)


def test_crops_are_windows_of_the_padded_image():
    images, labels, out, same = augmented(Augment(crop=2))
    dark = (0 - 0.5) / 0.25  # a black pixel, normalised
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=dark)
    corners = set()
    for image, whole in zip(out, padded, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.allclose(whole[y : y + 6, x : x + 6], image, atol=1e-5)
        ]
        assert len(found) == 1
        corners.update(found)
    assert len(corners) > 15
    np.testing.assert_array_equal(labels, same)


def test_mixup_blends_images_and_labels_alike():
    choice = Augment(mixup=True)
    images, labels, out, mixed = augmented(choice, count=8)
    # Of 36 pixels each, 8 images are independent: the blend can be read off.
    weights = np.linalg.lstsq(images.reshape(8, -1).T, out.reshape(8, -1).T)[0].T
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(weights @ labels, mixed, atol=1e-4)
    lam = weights.diagonal().min()
    pair = weights - lam * np.eye(8)
    np.testing.assert_allclose(np.sort(pair, 1)[:, :-1], 0, atol=1e-4)  # one each,
    np.testing.assert_allclose(pair.sum(0), 1 - lam, atol=1e-4)  # a permutation
    assert 0 < lam < 1
    assert not np.array_equal(out, augmented(choice, seed=1, count=8)[2])


def test_each_step_draws_anew_and_a_rerun_draws_the_same(problem):
    params, batch = problem
    choice = Augment(flip=True, crop=1)
    step = jax.jit(step_fn(linear, 3, choice))
    state = optim.init_state(params, hyper(learning_rate=1e-9))
    state, first = step(state, batch, jax.random.key(0))
    _, second = step(state, batch, jax.random.key(0))
    _, again = step(state, batch, jax.random.key(0))
    assert first["loss"] != second["loss"] and second["loss"] == again["loss"]


def test_batches_are_epochs_laid_end_to_end():
    steps = [loop.batch_positions(10, seed=3, step=k, batch_size=4) for k in range(10)]
    order = np.concatenate(steps).reshape(4, 10)
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(order[0], order[1])
    other = loop.batch_positions(10, seed=4, step=0, batch_size=4)
    assert not np.array_equal(steps[0], other)
    # A batch may hold more than an epoch.
    counts = np.bincount(loop.batch_positions(3, seed=0, step=0, batch_size=8))
    assert sorted(counts) == [2, 3, 3]


def test_a_cluster_must_share_the_batch_evenly(monkeypatch):
    class Three:
        size = 3

    devices.check_batch_size(8, Three())  # one process may have any number of devices
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices.check_batch_size(9, Three())
    with pytest.raises(ValueError, match="batch_size must be a multiple.*8 for 3 dev"):
        devices.check_batch_size(8, Three())


SHAPE = (32, 32, 3)


# One layer of each kind: the others are the same again, and tracing takes long.
@pytest.mark.parametrize(
    ("model", "fewer"),
    [
        ("vit", dict(depth=1)),
        ("resnet", dict(depths=(1, 1, 1, 1))),
        ("hybrid", dict(depth=1)),
    ],
)
def test_steps_of_the_accelerator_preset_lower_for_cuda_and_tpu(model, fewer):
    """Shapes alone: no parameter is made, nothing runs."""
    module = nnx.eval_shape(
        lambda: build(
            model,
            "s",
            image_shape=SHAPE,
            num_classes=10,
            dtype=jnp.bfloat16,
            overrides=fewer,
            rngs=nnx.Rngs(0),
        )
    )
    apply, params = optim.split_model(module)
    choice = Augment(flip=True, crop=4, mixup=True)
    numbers = hyper()
    numbers = numbers._replace(
        more=numbers.more | dict(pixel_mean=jnp.zeros(3), pixel_std=jnp.ones(3))
    )
    state = jax.eval_shape(optim.init_state, params, numbers)
    batch = Batch(
        jax.ShapeDtypeStruct((512, *SHAPE), jnp.uint8),
        jax.ShapeDtypeStruct((512,), jnp.int32),
    )
    rng = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.jit(step_fn(apply, 10, choice), donate_argnums=0)
    with jax.numpy_dtype_promotion("standard"):  # Flax promotes bfloat16 in norms
        exported = export.export(step, platforms=["cuda", "tpu"])(state, batch, rng)
    assert exported.platforms == ("cuda", "tpu")
    text = exported.mlir_module()
    assert "bf16" in text
    # Parameters and what the optimiser keeps of them stay float32.
    assert {a.dtype for a in exported.out_avals if a.ndim > 1} == {jnp.dtype("float32")}


def test_a_random_variant_draws_anew_each_step_of_training(tmp_path):
    file = tmp_path / "noisy.py"
    file.write_text(
        "import jax\n\n"
        "def noisy(query, key, value, *, rng):\n"
        "    return value + jax.random.normal(rng, value.shape, value.dtype)\n"
    )
    module = build(
        "vit",
        "mu",
        image_shape=(4, 4, 1),
        num_classes=3,
        attention=f"{file}:noisy",
        overrides=dict(patch=2, depth=1, dim=8, num_heads=2, mlp_dim=8),
        rngs=nnx.Rngs(0),
    )
    module.encoder.norm.bias[...] = jnp.arange(8.0)
    module.head.kernel[...] = jnp.eye(8, 3)
    apply, params = optim.split_model(module)
    images = jnp.ones((1, 4, 4, 1))
    one, two = (jax.random.key(i) for i in range(2))
    run = jax.jit(apply)
    assert np.array_equal(run(params, images, rng=one), run(params, images, rng=one))
    assert not np.allclose(run(params, images, rng=one), run(params, images, rng=two))
    assert np.array_equal(run(params, images), run(params, images))
    jax.grad(lambda p: run(p, images, rng=one).sum())(params)


@pytest.mark.parametrize("attention", ["routing", "clusterformer"])
def test_centroids_move_by_their_update_alone(attention):
    module = build(
        "vit",
        "mu",
        image_shape=(4, 4, 1),
        num_classes=3,
        attention=attention,
        overrides=dict(patch=2, depth=1, dim=8, num_heads=2, mlp_dim=8),
        rngs=nnx.Rngs(0),
    )
    apply, params = optim.split_model(module)
    numbers = hyper()._replace(weight_decay=np.float32(50.0))
    state = optim.init_state(params, numbers)
    step = jax.jit(step_fn(apply, 3, Augment()))
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 1), np.uint8)
    batch = Batch(images, np.arange(4, dtype=np.int32) % 3)

    def centroids(params):
        found = jax.tree_util.tree_leaves_with_path(params)
        return [x for path, x in found if "centroid" in jax.tree_util.keystr(path)]

    (start,) = centroids(params)
    inputs = tasks.normalize(images, numbers)
    _, moved = apply(params, inputs, rng=jax.random.key(0), mutable=True)
    (want,) = centroids(moved)
    (now,) = centroids(step(state, batch, jax.random.key(1))[0].params)
    np.testing.assert_allclose(now, want, atol=1e-6)
    assert not np.allclose(now, start, atol=1e-4)
    assert apply.has_state and apply(params, inputs, mutable=True)[1] == {}
    assert not optim.split_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))[0].has_state
