"""The PyTorch models of the benchmarks compute what ours do."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("optax")

import torch  # noqa: E402

from attn_jax import models
from benchmarks import all_steps, train_step  # noqa: E402
from benchmarks.steps import Step, steps
from benchmarks.timing import Effort
from benchmarks.torch_peers.images import ImageLoss, from_nnx
from benchmarks.torch_peers.params import flat_params, place
from benchmarks.torch_peers.step import Recipe, TrainStep
from experiments.attention_as_conv.cells import ConvCell, ConvTask
from experiments.attention_vs_rnn.cells import CopyTask, DecoderCell, PixelTask
from experiments.core import optim
from experiments.data.images import Dataset
from experiments.graphs import nodes, regression
from experiments.graphs.cells import MoleculeCell, NodeCell
from experiments.graphs.model import Edges
from experiments.graphs.nodes import Inputs
from experiments.tasks import images as tasks

CASES: dict[str, dict[str, Any]] = {
    "vit": dict(model="vit", size="mu", image_shape=(28, 28, 1)),
    "vit sincos2d": dict(
        model="vit",
        size="mu",
        image_shape=(16, 16, 3),
        overrides=dict(patch=4, positions="sincos2d", depth=2, num_heads=2),
    ),
    # Sides 28, 14, 7, 4: strides over even sides pad on one end only, over 7 on both.
    "resnet": dict(model="resnet", size="mu", image_shape=(28, 28, 1)),
    "hybrid": dict(
        model="hybrid",
        size="mu",
        image_shape=(16, 16, 3),
        overrides=dict(stem_widths=(4, 8), dim=16, depth=1, num_heads=2, mlp_dim=32),
    ),
    "resnet bottleneck": dict(
        model="resnet",
        size="mu",
        image_shape=(16, 16, 3),
        overrides=dict(widths=(8, 16), depths=(2, 1), bottleneck=True),
    ),
}


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> nnx.Module:
    """A model none of whose parameters is at a special value such as 0 or 1."""
    model = models.build(num_classes=10, rngs=nnx.Rngs(0), **CASES[request.param])
    rng = np.random.default_rng(0)
    params = nnx.state(model, nnx.Param)
    noise = jax.tree.map(
        lambda p: p + 0.05 * rng.standard_normal(p.shape).astype(np.float32), params
    )
    nnx.update(model, noise)
    return model


def _batch(model: Any, batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    side = model.grid[0] * model.patch if isinstance(model, models.ViT) else 28
    side = 16 if isinstance(model, models.Hybrid) else side
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (batch, side, side, model.channels), np.uint8)
    return images, rng.integers(0, 10, batch)


def _pixels(channels: int) -> dict[str, Any]:
    return dict(
        pixel_mean=tuple(0.4 + 0.1 * i for i in range(channels)),
        pixel_std=tuple(0.3 + 0.1 * i for i in range(channels)),
        label_smoothing=0.1,
    )


RECIPE = Recipe(
    learning_rate=1e-2, weight_decay=0.5, warmup=2.0, updates=5.0, clip_norm=0.3
)


def _hyper(channels: int) -> optim.Hyper:
    return optim.recipe(**RECIPE._asdict(), **_pixels(channels), mixup=0)


def _step(model: Any, **options: Any) -> TrainStep:
    loss = ImageLoss(from_nnx(model), **_pixels(model.channels), **options)
    return TrainStep(loss, RECIPE)


def _named(step: TrainStep) -> dict[str, torch.Tensor]:
    return dict(step.loss.model.named_parameters())


def _to_nnx(tensors: Any, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The peer's parameters or gradients as ours: the paths and shapes of `like`."""
    out = {}
    for path, ours in like.items():
        name, third = place(path, ours)
        value = tensors[name].detach().numpy()
        if third is not None:
            value = np.split(value, 3)[third]
        if path.endswith("kernel"):
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        out[path] = value.reshape(ours.shape)
    return out


def test_parameters_return_from_the_peer_unchanged(model: nnx.Module) -> None:
    ours = flat_params(model)
    peer = from_nnx(model)
    back = _to_nnx(dict(peer.named_parameters()), ours)
    assert sum(p.numel() for p in peer.parameters()) == sum(
        v.size for v in ours.values()
    )
    for path, value in ours.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_loss_and_gradients(model: Any, channels_last: bool) -> None:
    images, labels = _batch(model)
    apply, params = optim.split_model(model)
    smoothed = jax.nn.one_hot(labels, 10) * 0.9 + 0.01

    def loss_fn(params: Any) -> jax.Array:
        logits = apply(params, tasks.normalize(images, _hyper(model.channels)))
        return -jnp.mean(jnp.sum(smoothed * jax.nn.log_softmax(logits), axis=-1))

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    step = _step(model, flip=False, channels_last=channels_last)
    peer_loss, _ = step.gradients(images, labels)
    np.testing.assert_allclose(float(peer_loss), float(loss), rtol=1e-5)

    ours = flat_params(grads)
    theirs = _to_nnx({name: p.grad for name, p in _named(step).items()}, ours)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=float)) for g in ours.values()))
    peer_norm = np.sqrt(sum(np.sum(np.square(g, dtype=float)) for g in theirs.values()))
    np.testing.assert_allclose(peer_norm, norm, rtol=1e-4)
    for path, value in ours.items():
        # A softmax does not see the key's bias: its gradient is rounding alone.
        floor = 1e-6 * norm
        error = np.linalg.norm(theirs[path] - value)
        assert error <= 1e-4 * np.linalg.norm(value) + floor, path


def test_three_updates_lead_to_the_same_parameters(model: Any) -> None:
    images, labels = _batch(model)
    apply, params = optim.split_model(model)
    before = flat_params(params)
    theirs = _step(model, flip=False)
    ours = jax.jit(optim.make_step(tasks.image_loss(apply, 10, tasks.Augment())))
    state = optim.init_state(params, _hyper(model.channels))
    batch = tasks.Batch(images, labels.astype(np.int32))
    for _ in range(3):
        state, metrics = ours(state, batch, jax.random.key(0))
        loss, accuracy = theirs(images, labels)
        np.testing.assert_allclose(float(loss), float(metrics["loss"]), rtol=1e-4)
        assert float(accuracy) == float(metrics["accuracy"])

    after = flat_params(state.params)
    peers = _to_nnx(_named(theirs), after)
    for path, value in after.items():
        if path.endswith("key.bias"):
            continue  # Adam scales a gradient that is rounding alone to full steps
        moved = np.linalg.norm(value - before[path])
        assert moved > 0, path
        # Adam divides by the gradient's own size: 1e-5 of rounding becomes more.
        assert np.linalg.norm(peers[path] - value) <= 1e-2 * moved, path


def test_flip_mirrors_about_half_of_the_images() -> None:
    model = models.build(
        "resnet", "mu", image_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0)
    )
    loss = ImageLoss(from_nnx(model), (0.0,), (1.0,), 0.1)
    seen: list[torch.Tensor] = []
    loss.model.stem.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    images = np.broadcast_to(
        np.arange(8, dtype=np.uint8)[None, None, :, None], (64, 8, 8, 1)
    ).copy()
    torch.manual_seed(0)
    TrainStep(loss, RECIPE).gradients(images, np.zeros(64, np.int64))
    first = (255 * seen[0][:, 0, 0, 0]).round()
    assert set(first.tolist()) == {0.0, 7.0}
    assert 16 <= int((first == 7).sum()) <= 48


def test_models_without_a_peer_are_refused() -> None:
    model = models.build(
        "mlp", "mu", image_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="a Hybrid, got Mlp"):
        from_nnx(model)


def test_decay_acts_on_what_ours_decays(model: Any) -> None:
    ours = flat_params(model)
    step = _step(model)
    decaying, kept = (group["params"] for group in step.optimizer.param_groups)
    assert {group["weight_decay"] for group in step.optimizer.param_groups} == {0, 0.5}
    matrices = sum(value.size for value in ours.values() if value.ndim > 1)
    assert sum(p.numel() for p in decaying) == matrices
    rest = sum(value.size for value in ours.values() if value.ndim <= 1)
    assert sum(p.numel() for p in kept) == rest


def test_each_way_has_its_row() -> None:
    setting = train_step.settings(smoke=True)[1]
    assert setting.title == "train step, resnet mu, 28x28x1, batch 3"
    effort = Effort(rounds=1, seconds=0.0, smoke=True, say=lambda text: None)
    rows = {row["name"]: row for row in train_step.rows_of(setting, effort)}
    ways = {"torch eager", "torch eager channels_last"}
    assert set(rows) - {train_step.SPLIT} == {"ours", *ways}
    assert next(iter(rows)) in ways
    for row in rows.values():
        speed = 3e3 / row["milliseconds"]
        assert row["images_per_second"] == pytest.approx(speed)
        assert row["against"][train_step.FASTEST][0] > 0


def test_without_a_compiler_its_row_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(fn: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    setting = dataclasses.replace(train_step.settings(smoke=True)[0], batch=1)
    with train_step.alternatives(setting) as calls:
        assert set(calls) - {train_step.SPLIT} == {"ours", "torch eager"}
    expected = "torch compile is left out: RuntimeError: no C++ compiler\n"
    assert capsys.readouterr().out == expected


def test_settings_cover_the_widths_and_token_counts() -> None:
    settings = train_step.settings(batches=(64, 128))
    models_of = [s.build() for s in settings if (s.model, s.batch) == ("vit", 64)]
    assert [(m.grid[0] * m.grid[1], m.dim) for m in models_of] == [
        (16, 64),
        (49, 128),
        (64, 192),
    ]
    assert len(settings) == 8


def _images() -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 40, 8, 8, 1), np.uint8)
    labels = np.arange(40, dtype=np.int32) % 3
    arrays = dict(
        train_images=pixels[0], train_labels=labels, test_images=pixels[1],
        test_labels=labels,
    )  # fmt: skip
    return Dataset(
        name="noise", source="drawn", sha256="", class_names=tuple("abc"), **arrays
    )


def _of_task(task: Any, cell: Any) -> Step:
    return Step(cell.model, task, cell, task.batches(cell)[0])


COMMON: dict[str, Any] = dict(seed=0, updates=4, dim=8, depth=2, num_heads=2)


def _placed(model: str) -> Step:
    more = dict(key_dim=4) if model == "relative_content" else {}
    sizes = COMMON | dict(num_heads=4, mlp_dim=8, patch=2, start="random", **more)
    return _of_task(
        ConvTask(_images()), ConvCell(task="noise", model=model, n=30, **sizes)
    )


def _decoder(model: str, pixels: bool) -> Step:
    task = PixelTask(_images()) if pixels else CopyTask()
    more = dict(components=3, height=8) if pixels else {}
    sizes = COMMON | dict(batch_size=2, length=64, test_size=1, **more)
    return _of_task(task, DecoderCell(task="copy", model=model, **sizes))


def _stub(cell: Any, program: Any, batch: Any, **more: Any) -> Step:
    task: Any = types.SimpleNamespace(
        program=program, hyper=optim.hyper_of, unit=None, **more
    )
    return Step(cell.model, task, cell, batch)


def _nodes() -> Step:
    names = types.SimpleNamespace(kind_names=("up", "down"), class_names=("a", "b"))
    more = dict(kinds=True, reads_labels=True, shown=0.5, features=5, head_dim=3)
    cell = NodeCell(
        task="wordnet", model="gatv2", n=4, data="", score="gatv2", mlp_dim=8,
        **COMMON, **more,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    senders, receivers, kinds = rng.integers(0, [[9], [9], [3]], (3, 30))
    loops = np.arange(9)
    edges = Edges(
        *(
            np.concatenate(x).astype(np.int32)
            for x in ((senders, loops), (receivers, loops), (kinds, loops % 3))
        )
    )
    features = rng.standard_normal((9, 5)).astype(np.float32)
    labels = rng.integers(0, 2, 9).astype(np.int32)
    batch = Inputs(features, edges, labels, np.array([1, 5, 6, 8], np.int32))
    program = lambda cell: nodes.program_of(cell, names)  # noqa: E731
    return _stub(cell, program, batch, nodes=types.SimpleNamespace(graph=names))


def _molecules(sees: str, pairs: str) -> Step:
    cell = MoleculeCell(
        task="logp", model=pairs, data="", sees=sees, pairs=pairs, mlp_dim=8,
        batch_atoms=1, **COMMON,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    real = np.arange(5)[None] < np.array([[5], [3]])
    batch = regression.Batch(
        rng.integers(0, 2, (2, 5, 8)).astype(np.int8),
        rng.integers(0, 2, (2, 5, 5, 2)).astype(np.int8),
        real,
        rng.standard_normal(2).astype(np.float32),
        np.ones(2, np.float32),
    )
    return _stub(cell, lambda cell: regression.MoleculeTask.program(None, cell), batch)


def _labels() -> list[Step]:
    """One of each body, the transformer with all keys and with a window."""
    presets, names = all_steps.chosen(
        {
            "sequence_labelling": {
                "smoke": ("window:1", "cnn", "gru", "transformer"),
                "smoke_phones": ("transformer:4+2",),
            }
        }
    )
    return list(steps(presets, names.__contains__))


def _smoked(experiment: str, *words: str) -> list[Step]:
    """Steps of an experiment's smallest preset whose name has all words."""
    return list(steps({experiment: ("smoke",)}, lambda n: {*words} <= {*n.split()}))


STEPS: dict[str, Callable[[], list[Step]]] = {
    "labels": _labels,
    "decoders": lambda: [
        _decoder(model, pixels)
        for model in ("softmax", "linear", "lstm")
        for pixels in (False, True)
    ],
    "placed heads": lambda: [
        _placed(name) for name in ("quadratic", "gaussian", "relative_content")
    ],
    "pairs": lambda: _smoked("seq2seq", "transformer"),
    "long sequences": lambda: [
        *_smoked("long_range", "softmax", "recall_2"),
        *_smoked("long_range", "softmax", "listops_20"),
    ],
    "detectors": lambda: [
        *_smoked("detection", "detr"),
        *_smoked("detection", "centers"),
    ],
    "graphs": lambda: [
        _nodes(),
        _molecules("edges", "none"),
        _molecules("all", "both"),
    ],
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_of_experiments_have_the_same_loss(kind: str) -> None:
    found = STEPS[kind]()
    assert found
    for step in found:
        loss, norm = all_steps.check(step, all_steps.weights_of(step))
        assert loss > 0 and norm > 0
