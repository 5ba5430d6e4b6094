"""Two players: bounded, at two rates, learning one batch; likeness by other code."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from experiments.core import optim
from experiments.core.run import run
from experiments.core.store import ResultsStore
from experiments.data.images import unpack
from experiments.gan import cells, experiment
from experiments.gan.cells import GanCell, GanTask, JudgeCell, Shape
from experiments.gan.likeness import (
    Moments,
    frechet_distance,
    precision_recall,
    spread,
)
from experiments.gan.model import Bounded, Discriminator, Generator, Mixer
from experiments.gan.report import REPORT

SMOKE = experiment.PRESETS["smoke"]


# ------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Linear(6, 4, rngs=rngs),
        lambda rngs: nnx.Conv(3, 5, (3, 3), rngs=rngs),
        lambda rngs: nnx.Embed(4, 7, rngs=rngs),
    ],
)
def test_the_largest_singular_value_becomes_one(make):
    layer = Bounded(make(nnx.Rngs(0)), nnx.Rngs(1))
    inner = layer.normed.layer_instance
    kernel = inner.embedding if isinstance(inner, nnx.Embed) else inner.kernel
    before = np.asarray(kernel[...])
    largest = np.linalg.svd(before.reshape(-1, before.shape[-1]))[1][0]
    x = {2: jnp.ones((1, 6)), 4: jnp.ones((1, 5, 5, 3))}[before.ndim]
    x = jnp.arange(4) if isinstance(inner, nnx.Embed) else x
    plain = inner(x)
    for _ in range(60):
        layer(x, deterministic=False)
    (sigma,) = (v for k, v in layer.normed.batch_stats.items() if k[-1] == "sigma")
    assert float(sigma[...]) == pytest.approx(largest, rel=1e-4)
    np.testing.assert_array_equal(kernel[...], before)  # what learns is not divided
    np.testing.assert_allclose(
        layer(x, deterministic=True), plain / largest, rtol=1e-3, atol=1e-6
    )


def test_the_iteration_moves_in_training_calls_alone():
    layer = Bounded(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Rngs(1))
    stats = lambda: jax.tree.leaves(nnx.state(layer, nnx.BatchStat))  # noqa: E731
    first = stats()
    layer(jnp.ones((1, 6)), deterministic=True)
    assert all(map(np.array_equal, first, stats()))
    layer(jnp.ones((1, 6)), deterministic=False)
    assert not all(map(np.array_equal, first, stats()))


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_a_convolution_has_the_parameters_of_attention(channels):
    def parameters(kind):
        mixer = Mixer(kind, channels, 49, "dot_product", nnx.Rngs(0))
        return sum(x.size for x in jax.tree.leaves(nnx.state(mixer, nnx.Param)))

    attention, convolution = map(parameters, ("attention", "convolution"))
    assert convolution == pytest.approx(attention, rel=0.03)


@pytest.mark.parametrize("kind", ["attention", "convolution"])
@pytest.mark.parametrize("shrink", [2, 4])
def test_players_begin_as_if_nothing_were_added(kind, shrink):
    given = dict(width=4, shrink=shrink)
    drawn, told = [], []
    for what in (kind, "none"):
        own, other = (
            made((8, 8, 1), 3, kind=what, rngs=nnx.Rngs(0), **given, **more)
            for made, more in ((Generator, dict(latent=5)), (Discriminator, {}))
        )
        assert (own.mixer is None) == (what == "none")
        for model in (own, other):
            for kind_of in (nnx.Param, nnx.BatchStat):
                for path, value in nnx.to_flat_state(nnx.state(model, kind_of)):
                    if "mixer" not in path:  # all else alike
                        key = jax.random.key(len(str(path)))
                        value[...] = jax.random.normal(key, value.shape)
                        if path[-1] in ("var", "sigma"):
                            value[...] = abs(value[...])
        z, labels = jax.random.normal(jax.random.key(1), (2, 5)), jnp.array([0, 2])
        drawn.append(own(z, labels))
        told.append(other(drawn[0], labels))
    np.testing.assert_array_equal(*drawn)
    np.testing.assert_array_equal(*told)
    assert abs(drawn[0]).max() <= 1 and (drawn[0][0] != drawn[0][1]).any()


def test_weights_of_a_map_are_those_it_attends_by():
    mixer = Mixer("attention", 8, 16, "dot_product", nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    weights = mixer.weights(x)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    mixer.gamma[...] = jnp.float32(0.5)
    flat = x.reshape(-1, 8)
    value = mixer.layers[2](flat, deterministic=True).reshape(2, 16, 4)
    mixed = jnp.einsum("bts,bsh->bth", weights, value).reshape(-1, 4)
    expected = flat + 0.5 * mixer.layers[3](mixed, deterministic=True)
    np.testing.assert_allclose(
        mixer(x, deterministic=True), expected.reshape(x.shape), atol=1e-5
    )
    with pytest.raises(ValueError, match="cannot say its weights"):
        Mixer("convolution", 8, 16, "dot_product", nnx.Rngs(0)).weights(x)


# ------------------------------------------------------------------------- losses


def judge_cell(dataset, **more):
    given = dict(task="toy", model="judge", seed=0, updates=2, n=60, batch_size=6)
    return JudgeCell(**given | dict(widths=(4, 8), samples=30) | more)


def gan_cell(**more):
    given = dict(task="toy", model="gan", seed=0, updates=2, n=60, batch_size=6)
    given |= dict(width=4, latent=5, samples=30, judge="0", learning_rate=1e-3)
    return GanCell(**given | more)


@pytest.fixture
def task(dataset):
    found = GanTask(dataset, 30, judge_cell(dataset))
    program = found.program(found.judge)
    found._judge_params = program.initial_params(0)
    return found


def test_each_player_follows_its_own_loss(task):
    cell = gan_cell()
    program = task.program(cell)
    params, batch = program.initial_params(0), task.batches(cell)[0]
    rng = jax.random.key(3)
    grads = jax.grad(lambda p: program.loss(p, batch, rng, None)[0])(params)
    _, told = program.loss(params, batch, rng, None)
    split = {
        name: optim.split_model(model)[0]
        for name, model in cells.players(Shape.of(cell, task.dataset), 0).items()
    }
    of_z, of_draw, of_tell = jax.random.split(rng, 3)
    z, labels = jax.random.normal(of_z, (6, 5)), jnp.asarray(batch.labels)
    real = cells.pixels(batch.images)

    def drawn(own):
        return split["generator"](own, z, labels, rng=of_draw)

    def tells(other, images):
        return split["discriminator"](other, images, labels, rng=of_tell)

    def wants(other):
        fake = drawn(params["generator"])
        return cells.hinge(tells(other, real), tells(other, fake))

    def seems(own):
        return -tells(params["discriminator"], drawn(own)).mean()

    assert float(told["discriminator_loss"]) == pytest.approx(
        float(wants(params["discriminator"])), rel=1e-5
    )
    for name, loss in (("discriminator", wants), ("generator", seems)):
        alone = jax.grad(loss)(params[name])
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
            grads[name],
            alone,
        )


def test_the_generator_learns_at_its_share_of_the_rate(task):
    cell = gan_cell(share=0.25, updates=100, warmup=0.0)
    program = task.program(cell)
    params = program.initial_params(0)
    state = optim.init_state(params, task.hyper(cell))
    step = jax.jit(optim.make_step(program.loss))
    after, _ = step(state, task.batches(cell)[0], jax.random.key(0))

    def largest(name):
        moved = jax.tree.map(
            lambda x, y: abs(x - y).max(),
            _learnt(params[name]),
            _learnt(after.params[name]),
        )
        return float(max(jax.tree.leaves(moved)))

    # Without momentum the first step of Adam is the rate, whatever the gradient.
    assert largest("discriminator") == pytest.approx(1e-3, rel=1e-2)
    assert largest("generator") == pytest.approx(0.25e-3, rel=1e-2)
    # Statistics move too, by themselves.
    means = after.params["generator"]["norms"][0]["norm"]["mean"]
    assert abs(means).max() > 0


def _learnt(params):
    """Without statistics, which move by themselves."""
    if not isinstance(params, dict):
        return params
    left_out = ("batch_stats", "mean", "var")
    return {k: _learnt(v) for k, v in params.items() if k not in left_out}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "none"])
def test_one_batch_is_learnt_by_heart(dataset, kind):
    """A picture a class, of few levels: what is drawn comes near it, γ leaves 0."""
    images = np.where(dataset.train_images > 140, 220, 30).astype(np.uint8)
    for label, (row, column) in enumerate([(0, 0), (0, 4), (4, 0)]):
        images[label] = 30
        images[label, row : row + 4, column : column + 4] = 220
    dataset = dataclasses.replace(dataset, train_images=images)
    attention = "dot_product" if kind == "attention" else None
    task = GanTask(dataset, 30, judge_cell(dataset))
    cell = gan_cell(
        kind=kind,
        attention=attention,
        n=3,
        batch_size=6,
        width=8,
        updates=400,
        learning_rate=1.6e-2,
    )
    program = task.program(cell)
    state = optim.init_state(program.initial_params(0), task.hyper(cell))
    step = jax.jit(optim.make_step(program.loss), donate_argnums=0)
    batch = jax.device_put(task.batches(cell)[0])

    def away(params):
        drawn, labels = task.drawn(cell, params, 30)
        target = dataset.train_images[labels].astype(float)  # its first three
        return np.abs(drawn - target).mean()

    before = away(state.params)
    for _ in range(cell.updates):
        state, _ = step(state, batch, jax.random.key(0))
    assert dataset.train_labels[:3].tolist() == [0, 1, 2]
    assert away(state.params) < 0.15 * before
    if kind == "attention":
        assert abs(state.params["generator"]["mixer"]["gamma"]) > 1e-3


# ----------------------------------------------------------------------- likeness


def test_frechet_distance_is_that_of_scipys_root():
    rng = np.random.default_rng(0)
    for size in (2, 5, 20):
        one, two = (
            rng.normal(size=(60, size)) @ rng.normal(size=(size, size)) + shift
            for shift in (0.0, 0.7)
        )
        root = scipy.linalg.sqrtm(np.cov(one.T) @ np.cov(two.T)).real
        expected = np.square(one.mean(0) - two.mean(0)).sum()
        expected += np.trace(np.cov(one.T) + np.cov(two.T) - 2 * root)
        found = frechet_distance(Moments.of(one), Moments.of(two))
        assert found == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(Moments.of(one), Moments.of(one)) < 1e-9
    # Fewer pictures than features: a covariance without full rank.
    few = rng.normal(size=(3, 8))
    assert np.isfinite(frechet_distance(Moments.of(few), Moments.of(few + 1)))


def test_precision_and_recall_are_those_of_loops():
    rng = np.random.default_rng(1)
    real, drawn = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.5 + 0.3

    def share(of, by):
        inside = 0
        for x in of:
            amid = False
            for i, y in enumerate(by):
                others = sorted(
                    np.linalg.norm(y - z) for j, z in enumerate(by) if j != i
                )
                amid = amid or np.linalg.norm(x - y) <= others[2]
            inside += amid
        return inside / len(of)

    assert precision_recall(real, drawn) == (share(drawn, real), share(real, drawn))
    assert precision_recall(real, real) == (1.0, 1.0)
    far = precision_recall(real, real + 99)
    assert far == (0.0, 0.0)


def test_pictures_that_are_all_alike_have_no_spread():
    labels = np.array([0, 1] * 10)
    assert spread(np.eye(2)[labels], labels) == 0
    assert spread(np.random.default_rng(0).normal(size=(20, 4)), labels) > 0.5


# -------------------------------------------------------------------------- cells


def test_choices_see_validation_pictures_and_the_test_part_is_for_final_cells(task):
    cell, seen = gan_cell(), []
    part = task.part
    task.part = lambda name, count: seen.append(name) or part(name, count)
    params = task.program(cell).initial_params(0)
    found = task.score(dataclasses.replace(cell, phase="tune"), params)
    assert seen == ["val"] and {"val_fid", "val_recall"} <= set(found)
    assert not any(name.startswith("test") for name in found)
    assert set(task.observe(cell, params)) == {
        "val_fid",
        "generator_gamma",
        "discriminator_gamma",
    }
    assert seen == ["val", "val"]
    found = task.score(cell, params)
    assert seen == ["val", "val", "test"] and found["test_diversity"] > 0
    # The validation part is the end of the training images, which nothing trains on.
    images = task.dataset.train_images
    rows = np.unique(np.concatenate([task.batches(cell).where(i) for i in range(30)]))
    assert rows.max() == 59 and len(rows) == 60
    assert (part("val", 30).labels == task.dataset.train_labels[60:]).all()
    assert (part("val", 30).features == task.judged(images[60:], np.zeros(30))[0]).all()
    with pytest.raises(ValueError, match="n must be at most 60"):
        task.batches(gan_cell(n=61))


def test_what_is_shown_is_what_the_final_player_draws(task):
    cell = gan_cell()
    params = task.program(cell).initial_params(0)
    found = task.score(cell, params)
    json.dumps(found)
    shown = unpack(found["shown"], (-1, 8, 8, 1))
    assert len(shown) == 24 and len(unpack(found["between"], (-1, 8, 8, 1))) == 24
    drawn, labels = task.drawn(cell, params, 30)
    assert (shown == drawn[:24]).all() and labels[:4].tolist() == [0, 1, 2, 0]
    looks = np.array(found["looks"])
    assert looks.shape == (3, 4, 16)
    np.testing.assert_allclose(looks.sum(axis=-1), 1, atol=0.01)
    other = task.score(dataclasses.replace(cell, seed=1), params)
    assert "shown" not in other
    # A variant that draws cannot say where it looks; its pictures are shown.
    random = gan_cell(attention="performer")
    found = task.score(random, task.program(random).initial_params(0))
    assert "shown" in found and "looks" not in found


def test_floors_are_of_what_their_names_say(task):
    judged, seen, dataset = task.judged, [], task.dataset
    task.judged = lambda *given: seen.append(given) or judged(*given)
    found = task.score(task.judge, task._judge_params)
    assert list(found["floors"]) == ["real", "gaussian", "noise"]
    (test, _), (real, labels), (normal, _), (noise, _) = seen
    assert (test == dataset.test_images).all()
    assert (real == dataset.train_images[:30]).all()
    for label in range(3):
        of_class = dataset.train_labels[:60] == label
        expected = dataset.train_images[:60][of_class].astype(float).mean()
        assert normal[labels == label].mean() == pytest.approx(expected, abs=6)
    assert noise.mean() == pytest.approx(127.5, abs=6) and noise.max() > 250


def test_a_cell_names_what_is_wrong():
    for wrong, said in (
        (dict(shrink=3), "shrink must be 2 or 4"),
        (dict(kind="none"), "attention must be given with kind='attention'"),
        (dict(attention=None), "attention must be given with kind='attention'"),
        (dict(share=0.0), "share must be above 0, at most 1"),
    ):
        with pytest.raises(ValueError, match=said):
            gan_cell(**wrong)


def test_data_that_cannot_be_drawn_are_refused(npz):
    for wrong, said in (
        (dict(n=61, held=30), "n must be at most 60"),
        (dict(held=90), "n must be at most 0"),
    ):
        with pytest.raises(ValueError, match=said):
            experiment.plans(dataclasses.replace(SMOKE, task=f"npz:{npz}", **wrong))


def test_a_run_judges_draws_and_reports_also_a_variant_of_a_file(tmp_path, capfd):
    mine = tmp_path / "mine.py"
    mine.write_text("from attn_jax.attention import dot_product as attend\n")
    options = f"--preset smoke --rows convolution --attention {mine}:attend --out"
    arguments = [*options.split(), str(tmp_path / "out"), "--engine", "inline"]
    assert run(experiment.EXPERIMENT, arguments) == 0
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    for said in (
        "attention (mine.py:attend) at half of the side",
        "convolution at half of the side",
        "training pictures themselves",
        "cannot be compared with those in Inception's features",
    ):
        assert said in report, said
    for name in ("curves", "samples", "between"):
        assert (tmp_path / "out" / f"{name}.png").is_file()
    store = ResultsStore(tmp_path / "out")
    gan = [r for r in store.records() if r["config"]["model"] == "gan"]
    assert all(r["curves"]["observed_at"] == [0, 2] for r in gan)
    assert all(r["metrics"]["generator_flops"] > 0 for r in gan)


def test_a_loss_that_is_not_finite_is_a_record(tmp_path):
    options = "--preset smoke --rows none --learning-rates 1e38 --updates 4 --out"
    arguments = [*options.split(), str(tmp_path), "--engine", "inline"]
    run(experiment.EXPERIMENT, [*arguments, "--log-every", "1"])
    (record,) = (
        r for r in ResultsStore(tmp_path).records() if r["config"]["model"] == "gan"
    )
    assert record["status"] == "diverged" and record["metrics"]["diverged_at"] <= 4


def test_a_report_says_what_is_better_and_what_collapsed(tmp_path):
    def record(kind, seed, fid, diversity=0.9, shrink=2):
        config = gan_cell(
            seed=seed,
            kind=kind,
            shrink=shrink,
            attention="dot_product" if kind == "attention" else None,
        ).config()
        names = "precision recall class_accuracy".split()
        metrics = {f"test_{name}": 0.5 for name in names}
        metrics |= dict(test_fid=fid, test_diversity=diversity)
        metrics |= dict(generator_params=3, discriminator_params=4)
        metrics |= dict(generator_flops=1e6, discriminator_flops=2e6)
        curves = dict(step=[5], observed_at=[0, 5], val_fid=[9.0, fid])
        return dict(config=config, status="done", metrics=metrics, curves=curves)

    records = []
    for seed in range(3):
        records.append(record("attention", seed, 1.0 + seed / 100))
        records.append(record("convolution", seed, 3.0 - seed / 100))
        records.append(record("none", seed, 3.1 + seed, diversity=0.1))
    text = REPORT.write(records, tmp_path)
    name = "attention at half of the side less convolution at half of the side"
    assert f"{name}: −1.98 [−2.03, −1.93], clear." in text
    assert "attention at half of the side less neither:" in text
    assert "**Collapsed: neither**" in text and "Collapsed: attention" not in text
    lost = dict(records[0], status="diverged", metrics=dict(diverged_at=7))
    lost["config"] = dict(records[0]["config"], seed=3)
    assert "seed 3: was not finite at update 7." in REPORT.write(
        [*records, lost], tmp_path
    )
