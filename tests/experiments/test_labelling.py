"""Training of labellers: cells, resuming, records, reports, command lines."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.core.studies import Study, run_studies
from experiments.sequence_labelling.presets import PRESETS, Experiment

from experiments.core import train
from experiments.core.cell import Runtime, attention_digest
from experiments.core.loop import Interrupted, StopSignal
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore
from experiments.data import sequence_tasks, sequences
from experiments.positions import __main__ as positions_main
from experiments.sequence_labelling import __main__ as labelling_main
from experiments.sequence_labelling import report, run
from experiments.tasks import labelling
from experiments.tasks.labelling import LabelCell, LabelRunner

ROOT = pathlib.Path(__file__).parents[2]

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
    id_dropout=0.2,
)


@pytest.fixture(scope="module")
def data():
    return sequence_tasks.load_task("toy_pos")


class StopAfter(StopSignal):
    """A signal that comes after so many looks at it."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def signum(self):
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None


def runner(data, folder, stop=None, **more):
    runtime = Runtime(log_every=2, checkpoint_seconds=1e9)
    return LabelRunner(
        data,
        ResultsStore(folder),
        runtime,
        Progress(1, live=False),
        stop or StopSignal(),
        **more,
    )


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


@pytest.mark.parametrize("attention", ["routing", "clusterformer", "mine"])
def test_centroids_learn_and_are_stored_and_do_not_decay(attention, data, tmp_path):
    """State that no gradient reaches goes through steps, checkpoints and scores."""
    if attention == "mine":
        (tmp_path / "mine.py").write_text(MINE)
        attention = f"{tmp_path / 'mine.py'}:attend"
    cell = dataclasses.replace(
        CELL,
        model="transformer",
        window=None,
        attention=attention,
        attention_sha256=attention_digest(attention),
        num_heads=2,
        positions="none",
        dropout_rate=0.0,
        weight_decay=50.0,
        updates=4,
        learning_rate=1e-3,
    )
    leaf = "seen" if "mine" in attention else "centroid"

    def state(params):
        found = jax.tree_util.tree_leaves_with_path(params)
        (one,) = [x for path, x in found if leaf in jax.tree_util.keystr(path)]
        return np.asarray(one)

    made = runner(data, tmp_path / "a", save_params=lambda cell: True)
    programs = labelling.programs(labelling.program_key(cell, data))
    start = state(programs.initial_params(cell.seed))
    assert made.run(cell)
    after = labelling.load_params(made.store, cell, data)
    assert not np.allclose(state(after), start, atol=1e-4)
    if leaf == "seen":  # tokens seen: a whole number, one of all heads
        assert np.unique(state(after)).size == 1 and state(after).max() % 1 == 0
    else:
        np.testing.assert_allclose(np.linalg.norm(state(after), axis=-1), 1, rtol=1e-5)
    # An interrupted run goes on from the state that it had.
    with pytest.raises(Interrupted):
        runner(data, tmp_path / "b", StopAfter(0)).run(cell)
    again = runner(data, tmp_path / "b", save_params=lambda cell: True)
    assert again.run(cell)
    resumed = labelling.load_params(again.store, cell, data)
    jax.tree.map(np.testing.assert_array_equal, resumed, after)


def test_an_interrupted_cell_ends_as_if_nothing_had_been(data, tmp_path, capsys):
    whole = runner(data, tmp_path / "a", save_params=lambda cell: True)
    assert whole.run(CELL)
    one = whole.store.get(CELL.config())
    with pytest.raises(Interrupted):
        runner(data, tmp_path / "b", StopAfter(1)).run(CELL)
    again = runner(data, tmp_path / "b")
    assert not again.has(CELL)
    assert again.run(CELL)
    two = again.store.get(CELL.config())
    assert two["curves"] == one["curves"]
    for name, value in one["metrics"].items():
        if name != "updates_per_s":
            assert two["metrics"][name] == value, name
    metrics = one["metrics"]
    assert metrics["updates"] == 6 and metrics["n"] == len(data.train)
    assert 0 < metrics["test_accuracy"] < 1
    assert {"test_accuracy_ambiguous", "train_accuracy", "flops"} <= set(metrics)
    assert one["curves"]["step"] == [2, 4, 6]
    assert one["curves"]["loss"][-1] < one["curves"]["loss"][0]
    # The parameters that were kept are those that were scored.
    params = labelling.load_params(whole.store, CELL, data)
    predicted, _ = whole.predict(CELL, params, data.test)
    accuracy = labelling.scores(data.test, predicted)["accuracy"]
    assert accuracy == metrics["test_accuracy"]
    with pytest.raises(
        FileNotFoundError, match="parameters of this cell were not kept"
    ):
        labelling.load_params(again.store, CELL, data)
    # A tuning cell never reads the test part.
    tune = dataclasses.replace(CELL, phase="tune", updates=2)
    whole.run(tune)
    tuned = whole.store.get(tune.config())["metrics"]
    assert "val_accuracy" in tuned and not any("test" in name for name in tuned)
    # A study takes the better of a grid, and another one takes it over.
    worse = dataclasses.replace(tune, learning_rate=1e-5)
    study = Study("window", (worse, tune), updates=6, seeds=1)
    taken = Study("like it", (worse, tune), updates=2, seeds=1, tuned_by=study)
    run_studies({"window": study, "like it": taken}, whole)
    assert study.best(whole.store) == taken.best(whole.store) == 1
    assert study.done(whole.store) == study.total() == 3
    assert taken.done(whole.store) == taken.total() == 1
    text = report.REPORT.write(whole.store.records(), tmp_path / "report")
    assert "fully connected, window ±1" in text
    assert f"{metrics['test_accuracy']:.4f}"[1:] in text


def test_speech_is_scored_on_whole_utterances_beside_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sequence_tasks, "CROP", 64)
    data = sequence_tasks.load_task("toy_phones")
    assert data.max_length == 64 and max(data.whole_lengths) == 128
    assert data.whole_test.lengths.sum() == data.test.lengths.sum()
    assert len(data.whole_test) < len(data.test)
    alone = dataclasses.replace(CELL, task="toy_phones", window=0, id_dropout=0.0)
    near = dataclasses.replace(alone, window=40)
    learned = dataclasses.replace(
        alone,
        model="transformer",
        window=None,
        num_heads=2,
        attention="dot_product",
        positions="learned",
    )
    trained = runner(data, tmp_path)
    found = []
    for cell in (alone, near, learned):
        assert trained.run(cell)
        found.append(trained.store.get(cell.config())["metrics"])
    # A vector by itself is labelled alike wherever it is cut; its neighbours are not.
    assert found[0]["test_whole_accuracy"] == found[0]["test_accuracy"]
    assert found[0]["test_whole_accuracy_speech"] == found[0]["test_accuracy_speech"]
    assert "test_whole_accuracy" in found[1]
    for cell, alike in ((alone, True), (near, False)):
        params = labelling.programs(labelling.program_key(cell, data)).initial_params(0)
        random = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype),  # noqa: B023
            params,
        )
        pieces, _ = trained.predict(cell, params, data.test)
        whole, _ = trained.predict(cell, params, data.whole_test, data.whole_lengths)
        same = np.array_equal(np.concatenate(pieces), np.concatenate(whole))
        assert same == alike, cell.window
    # A table of 64 positions says nothing of the 65th: no score, not a wrong one.
    assert not any("whole" in name for name in found[2])


def test_padding_and_other_rows_change_no_gradient():
    apply = lambda params, x, real, rng: x * params["w"]  # noqa: E731
    step = jax.jit(labelling.make_train_step(apply, hides=False))
    hyper = labelling.Hyper(*(np.float32(x) for x in (1e-2, 0.0, 1, 10, 1e9, 0.0)))
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 4)).astype(np.float32)
    labels = np.array([[1, 2, 0], [3, 3, 3]], np.int32)

    def after(x, y):
        state = train.init_state({"w": jnp.ones((4,), jnp.float32)}, hyper)
        with jax.numpy_rank_promotion("allow"):
            state, metrics = step(state, sequences.Batch(x, y), jax.random.key(0))
        return np.asarray(state.params["w"]), float(metrics["loss"])

    ignored = labels.copy()
    ignored[1] = sequences.IGNORED
    once, loss = after(logits, ignored)
    other = logits.copy()
    other[1] = 100.0
    again, same = after(other, ignored)
    assert (once == again).all() and loss == same
    shifted = logits[0] - logits[0].max(-1, keepdims=True)
    wanted = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(3), labels[0]]
    assert abs(loss - wanted.mean()) < 1e-5
    assert after(logits, labels)[1] != loss


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
        (dict(left=3), "left is for attention='truncated'"),
        (dict(updates=0), "updates must be at least 1, got 0"),
        (dict(learning_rate=float("nan")), "learning_rate must be above 0"),
    ],
)
def test_a_cell_that_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CELL, **change)


def test_every_preset_plans_cells_that_models_can_be_built_of():
    for name, preset in PRESETS.items():
        studies = run.plan_studies(preset, preset.task)
        assert list(studies)[: len(preset.models)] == list(preset.models), name
        for study in studies.values():
            assert len(study.final(0)) == preset.seeds
    contexts = run.plan_studies(PRESETS["phones"], "phones")
    cell = contexts["context 32+4"].final(0)[0]
    assert (cell.attention, cell.left, cell.right) == ("truncated", 32, 4)
    heads = run.plan_studies(PRESETS["pos"], "pos")
    # What is varied is one thing; the base of a variation is shared by all.
    assert heads["heads=4"].final(0) == heads["score=dot_product"].final(0)
    with pytest.raises(ValueError, match="'heads=2' is a variation of 'transformer'"):
        run.plan_studies(Experiment(models=("gru",), heads=(2,)), "pos")


DEVICES = """
import dataclasses, json, sys
import jax
from experiments.data import sequence_tasks
from experiments.core.cell import Runtime, attention_digest
from experiments.tasks.labelling import LabelCell, LabelRunner
from experiments.core.loop import StopSignal
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore
assert len(jax.devices()) == 8
cell = LabelCell(**json.loads(sys.argv[2]) | {"position_options": ()})
store, data = ResultsStore(sys.argv[1]), sequence_tasks.load_task("toy_pos")
runtime, progress = Runtime(log_every=1), Progress(1, live=False)
LabelRunner(data, store, runtime, progress, StopSignal()).run(cell)
"""


def test_eight_devices_give_the_curve_of_one(data, tmp_path):
    cell = dataclasses.replace(CELL, updates=3)
    folder = tmp_path / "eight"
    subprocess.run(
        [sys.executable, "-c", DEVICES, str(folder), json.dumps(cell.config())],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"},
        check=True,
        timeout=300,
    )
    alone = LabelRunner(
        data,
        ResultsStore(tmp_path / "one"),
        Runtime(log_every=1),
        Progress(1, live=False),
        StopSignal(),
    )
    alone.run(cell)
    one, eight = (
        store.get(cell.config()) for store in (alone.store, ResultsStore(folder))
    )
    assert eight["provenance"]["device_count"] == 8
    np.testing.assert_allclose(
        eight["curves"]["loss"], one["curves"]["loss"], rtol=1e-4
    )
    assert eight["metrics"]["test_accuracy"] == pytest.approx(
        one["metrics"]["test_accuracy"], abs=5e-3
    )


def test_a_step_lowers_for_cuda_and_tpu(data):
    cell = run.base_cell(PRESETS["smoke"], "toy_pos", "transformer", dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms take bfloat16 so
        program = labelling.programs(labelling.program_key(cell, data))
        hyper = labelling.Hyper(*(np.float32(1) for _ in labelling.Hyper._fields))
        state = train.init_state(program.initial_params(0), hyper)
        batch = sequences.Batches(data.train, data.lengths, 256, seed=0)[0]
        exported = jax.export.export(program.step, platforms=("cuda", "tpu"))(
            state, batch, jax.random.key(0)
        )
    assert set(exported.platforms) == {"cuda", "tpu"}


@pytest.mark.parametrize("main", [labelling_main, positions_main])
def test_the_command_line_names_what_is_wrong(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse(["--preset", "smoke", "--seeds", "0"])
    assert ended.value.code == 2
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    assert main.parse(["--preset", "smoke", "--seeds", "2"]).experiment.seeds == 2


def test_a_fault_in_ones_own_attention_shows_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax\n\n\n"
        "def weigh(scores, length):\n"
        "    return scores + (None if length > 16 else 0)\n\n\n"
        "def attend(query, key, value, bias=None, mask=None, *, key_mask=None):\n"
        "    scores = weigh(query @ key.T, len(key))\n"
        "    return jax.nn.softmax(scores) @ value\n"
    )
    options = ["--preset", "smoke", "--workers", "1", "--out", str(tmp_path / "out")]
    options += ["--models", "gru", "transformer"]
    for flag in ("--attention", "--scores"):
        assert labelling_main.main([*options, flag, f"{file}:attend"]) == 2
        said = capsys.readouterr().err
        assert re.search("attention: .* does not run .*, line 5 of .*mine.py", said)
        assert "unsupported operand type(s) for +" in said
        for line in ("line 9, in attend", "line 5, in weigh", "scores + (None"):
            assert line in said
    assert not ResultsStore(tmp_path / "out").records()
