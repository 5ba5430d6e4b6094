"""Labellers: cells, the loss, scores, plans, and a run of both experiments."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.core import optim, run
from experiments.core.cell import attention_digest
from experiments.core.store import ResultsStore
from experiments.data import sequence_tasks, sequences
from experiments.positions import experiment as positions
from experiments.sequence_labelling import experiment, heads, streaming
from experiments.sequence_labelling.experiment import PRESETS, Config, plan_studies
from experiments.tasks import labelling
from experiments.tasks.labelling import LabelCell, LabelTask

CELL = LabelCell(
    task="toy_pos",
    model="window",
    window=1,
    seed=0,
    updates=6,
    tokens=256,
    dim=8,
    depth=1,
    mlp_dim=8,
    learning_rate=1e-2,
    dropout_rate=0.0,
)
TRANSFORMER = dataclasses.replace(
    CELL,
    model="transformer",
    window=None,
    num_heads=2,
    attention="dot_product",
    positions="none",
)


@pytest.fixture(scope="module")
def data():
    return sequence_tasks.load_task("toy_pos")


def random(params):
    """Parameters of the same shapes that say something."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params
    )


# ------------------------------------------------------------------ the loss


def test_padding_and_other_rows_change_no_gradient():
    key = dataclasses.replace(
        labelling.program_key(CELL, sequence_tasks.load_task("toy_phones")),
        inputs=3,
        num_classes=4,
        max_length=3,
    )
    program = labelling.program_of(key)
    params = random(program.initial_params(0))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 3)).astype(np.float32)
    y = np.array([[1, 2, 0], [3, 3, 3]], np.int32)

    @jax.jit
    def after(x, y):
        batch, key = sequences.Batch(x, y), jax.random.key(0)
        loss = lambda params: program.loss(params, batch, key, None)[0]  # noqa: E731
        return jax.value_and_grad(loss)(params)

    ignored = y.copy()
    ignored[1] = sequences.IGNORED
    other = x.copy()
    other[1] = 100.0
    loss, gradient = after(x, ignored)
    assert loss == after(other, ignored)[0] != after(x, y)[0]
    jax.tree.map(np.testing.assert_array_equal, gradient, after(other, ignored)[1])
    logits = np.asarray(program.more["apply"](params, x[:1], np.ones((1, 3), bool)))[0]
    wanted = np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), y[0]]
    assert loss == pytest.approx(wanted.mean(), rel=1e-5)


def test_a_hidden_word_is_the_unknown_one(data):
    task, cell = LabelTask(data), dataclasses.replace(CELL, id_dropout=0.5)
    program, batch = task.program(cell), task.batches(cell)[0]
    params, hyper = random(task.initial_params(cell)), task.hyper(cell)
    unknown = batch.inputs.copy()
    unknown[..., 0] = 1

    @jax.jit
    def loss(inputs, share):
        numbers = hyper._replace(more={"id_dropout": share})
        given = batch._replace(inputs=inputs)
        return program.loss(params, given, jax.random.key(0), numbers)[0]

    assert loss(batch.inputs, 1.0) == loss(unknown, 0.0)
    assert loss(batch.inputs, 0.0) not in (loss(unknown, 0.0), loss(batch.inputs, 0.5))


MINE = """
import jax.numpy as jnp

def attend(query, key, value, *, params, key_mask=None):
    return params["gain"] * value

def attend_init(rng, head_dim):
    return {"gain": jnp.ones(()), "seen": jnp.ones((2, 2))}

def attend_update(params, query, key, key_mask=None):
    tokens = len(key) if key_mask is None else key_mask.sum()
    return {"seen": params["seen"] + jnp.asarray(tokens, jnp.float32)}
"""


def test_state_of_an_attention_learns_from_real_tokens_alone(data, tmp_path):
    """It goes through steps and into scores, and neither decays nor is padded."""
    (tmp_path / "mine.py").write_text(MINE)
    attention = f"{tmp_path / 'mine.py'}:attend"
    cell = dataclasses.replace(
        TRANSFORMER,
        attention=attention,
        attention_sha256=attention_digest(attention),
        weight_decay=50.0,
    )
    task = LabelTask(data)
    program, batches = task.program(cell), task.batches(cell)
    state = optim.init_state(task.initial_params(cell), task.hyper(cell))
    step, wanted = jax.jit(optim.make_step(program.loss)), 1.0
    for k in range(2):
        state, _ = step(state, batches[k], jax.random.key(0))
        wanted += (batches[k].labels != sequences.IGNORED).sum()
    found = jax.tree_util.tree_leaves_with_path(state.params)
    (seen,) = [x for path, x in found if "seen" in jax.tree_util.keystr(path)]
    np.testing.assert_allclose(seen, wanted, rtol=1e-6)
    assert 0 < task.score(cell, state.params)["test_accuracy"] < 1


def test_a_step_lowers_for_cuda_and_tpu(data):
    cell, task = dataclasses.replace(TRANSFORMER, dtype="bfloat16"), LabelTask(data)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms take bfloat16 so
        program = task.program(cell)
        state = optim.init_state(program.initial_params(0), task.hyper(cell))
        step = jax.jit(optim.make_step(program.loss), donate_argnums=0)
        exported = jax.export.export(step, platforms=("cuda", "tpu"))(
            state, task.batches(cell)[0], jax.random.key(0)
        )
    assert set(exported.platforms) == {"cuda", "tpu"}


# ------------------------------------------------------------------ scores


def test_a_tuning_cell_never_reads_the_test_part(data):
    task = LabelTask(dataclasses.replace(data, test=None))
    tune = dataclasses.replace(CELL, phase="tune")
    found = task.score(tune, task.initial_params(tune))
    assert "val_accuracy" in found and not any("test" in name for name in found)


def test_speech_is_scored_on_whole_utterances_beside_its_pieces(monkeypatch):
    monkeypatch.setattr(sequence_tasks, "CROP", 64)
    data = sequence_tasks.load_task("toy_phones")
    assert data.max_length == 64 and max(data.whole_lengths) == 128
    assert data.whole_test.lengths.sum() == data.test.lengths.sum()
    assert len(data.whole_test) < len(data.test)
    task = LabelTask(data)

    def scored(cell, **changes):
        cell = dataclasses.replace(cell, task="toy_phones", **changes)
        return task.score(cell, random(task.initial_params(cell)))

    # A vector by itself is labelled alike wherever it is cut; its neighbours are not.
    alone, near = scored(CELL, window=0), scored(CELL, window=40)
    for name in ("accuracy", "accuracy_speech"):
        assert alone[f"test_whole_{name}"] == alone[f"test_{name}"]
        assert near[f"test_whole_{name}"] != near[f"test_{name}"]
    # A table of 64 positions says nothing of the 65th: no score, not a wrong one.
    assert not any("whole" in name for name in scored(TRANSFORMER, positions="learned"))


# ------------------------------------------------------------------ cells and plans


def test_smaller_training_parts_are_nested_and_short_enough(data):
    parts = [
        labelling.training_part(dataclasses.replace(CELL, n=n, train_length=10), data)
        for n in (5, 20)
    ]
    assert [len(part) for part in parts] == [5, 20]
    assert max(parts[1].lengths) <= 10
    for small, large in zip(parts[0].inputs, parts[1].inputs, strict=False):
        np.testing.assert_array_equal(small, large)
    with pytest.raises(ValueError, match="n=100000 is larger than the training part"):
        labelling.training_part(dataclasses.replace(CELL, n=100_000), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=None), "window must be given for model 'window', got None"),
        (dict(num_heads=2), "num_heads must be left out for model 'window', got 2"),
        (dict(left=3), "left must be given with attention='truncated' alone"),
    ],
)
def test_a_cell_that_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CELL, **change)


def test_every_preset_plans_its_models_and_varies_one_thing_at_a_time():
    for name, preset in PRESETS.items():
        studies = plan_studies(preset, preset.task)
        assert list(studies)[: len(preset.models)] == list(preset.models), name
        assert all(len(s.final(0)) == preset.seeds for s in studies.values())
    cell = plan_studies(PRESETS["phones"], "phones")["context 32+4"].final(0)[0]
    assert (cell.attention, cell.left, cell.right) == ("truncated", 32, 4)
    heads = plan_studies(PRESETS["pos"], "pos")
    # The base of a variation is shared by all.
    assert heads["heads=4"].final(0) == heads["positions=rope"].final(0)
    # Scores have one kind of positions, and rates of their own.
    one, two = (heads[f"score={name}"] for name in ("additive", "dot_product"))
    assert one.tuned_by is None and len(one.tuning()) == 4
    changed = dict(attention="dot_product", learning_rate=two.grid[0].learning_rate)
    assert dataclasses.replace(one.grid[0], **changed) == two.grid[0]
    # The transformers of `heads` are those of `pos`.
    (again,) = plan_studies(PRESETS["heads"], "pos").values()
    assert again.final(0) == heads["transformer"].final(1)
    with pytest.raises(ValueError, match="'heads=2' is a variation of 'transformer'"):
        plan_studies(Config(models=("gru",), heads=(2,)), "pos")


# ------------------------------------------------------------------ runs


def test_a_run_of_labelling_scores_the_parameters_that_it_keeps(data, tmp_path):
    options = "--preset smoke --models transformer --engine inline --out"
    assert run.run(experiment.EXPERIMENT, [*options.split(), str(tmp_path)]) == 0
    store = ResultsStore(tmp_path)
    smoke = dataclasses.replace(PRESETS["smoke"], models=("transformer",))
    (plan,) = experiment.plans(smoke)
    (cell,) = plan.studies[0].final(0)
    metrics = store.get(cell.config())["metrics"]
    assert metrics["n"] == len(data.train)
    costs = {"params", "input_params", "position_params", "flops", "train_labels"}
    assert costs | {"test_accuracy_ambiguous", "train_accuracy"} <= set(metrics)
    params = labelling.load_params(store, cell, data)
    predicted, _ = plan.task.predict(cell, params, data.test)
    accuracy = labelling.scores(data.test, predicted)["accuracy"]
    assert accuracy == metrics["test_accuracy"]
    assert f"{accuracy:.4f}"[1:] in (tmp_path / "report.md").read_text("utf-8")
    other = dataclasses.replace(data, name="pos")
    with pytest.raises(ValueError, match="its task is 'toy_pos', but data is 'pos'"):
        labelling.load_params(store, cell, other)


def test_heads_are_ablated_in_a_model_of_kept_parameters(data, monkeypatch):
    monkeypatch.setattr(heads, "LENGTH", int(data.test.lengths[0]))
    program = labelling.program_of(labelling.program_key(TRANSFORMER, data))
    kept = jax.tree.map(np.asarray, random(program.initial_params(0)))
    model = streaming.labeller_of(TRANSFORMER, data, kept, data.max_length)
    found = heads.look(model, data, data.test, 256)
    predicted, _ = LabelTask(data).predict(TRANSFORMER, kept, data.test)
    whole = labelling.scores(data.test, predicted)["accuracy"]
    assert found["whole"]["accuracy"] == pytest.approx(whole, abs=1e-6)
    (layer,) = found["without"]
    assert len(layer) == 2
    assert any(one["accuracy"] != found["whole"]["accuracy"] for one in layer)
    offsets = np.array(found["offsets"])
    assert offsets.shape == (1, 2, 2 * heads.REACH + 1)
    assert (offsets.sum(axis=-1) <= 1.001).all()
    by_tag = np.array(found["whole"]["by_tag"])
    assert by_tag @ found["counts"] / sum(found["counts"]) == pytest.approx(
        whole, abs=1e-4
    )


def test_a_run_of_positions_is_scored_by_length(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
    options = "--preset smoke --encodings none rope --engine inline --out"
    assert run.run(positions.EXPERIMENT, [*options.split(), str(tmp_path)]) == 0
    found = ResultsStore(tmp_path).records()
    assert {r["config"].get("positions") for r in found} == {"none", "rope", None}
    for record in found:
        assert record["config"]["task"] == "toy_pos_by_length_8-64"
        lengths = {f"test_accuracy_length_{bin}" for bin in ("1_8", "9_64")}
        assert lengths <= set(record["metrics"])


def test_a_fault_in_ones_own_attention_shows_before_anything_runs(tmp_path, capsys):
    """Each padded length is tried, and of a comparison each variant."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax\n\n\n"
        "def weigh(scores, length):\n"
        "    return scores + (None if length > 16 else 0)\n\n\n"
        "def attend(query, key, value, bias=None, mask=None, *, key_mask=None):\n"
        "    scores = weigh(query @ key.T, len(key))\n"
        "    return jax.nn.softmax(scores) @ value\n"
    )
    options = f"--preset smoke --engine inline --out {tmp_path / 'out'} --models gru"
    for flag in ("--attention", "--scores"):
        given = [*options.split(), "transformer", flag, f"{file}:attend"]
        assert run.run(experiment.EXPERIMENT, given) == 2
        said = capsys.readouterr().err
        assert re.search("attention: .* does not run .*, line 5 of .*mine.py", said)
        assert "unsupported operand type(s) for +" in said
        for line in ("line 9, in attend", "line 5, in weigh", "scores + (None"):
            assert line in said
    assert not ResultsStore(tmp_path / "out").records()
