"""The arena: cells, models, baselines, plans, and what the report says of them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments.core import run
from experiments.core.loop import trace_step
from experiments.core.store import ResultsStore
from experiments.data import recall
from experiments.data.fetch import DataError
from experiments.data.sequences import IGNORED
from experiments.data.symbols import Fold, SymbolData
from experiments.long_range import baselines, experiment, tasks
from experiments.long_range.cells import (
    LongCell,
    LongTask,
    cost_of,
    program_of,
    spans_of,
)
from experiments.long_range.report import REPORT

FEW = (12, 5, 6)


def whole(kind: str = "plain", length: int = 9) -> SymbolData:
    """A task with a label a sequence, or a pair of them, or an image."""
    rng = np.random.default_rng(0)
    lead = (2,) if kind == "pairs" else ()

    def part(count):
        lengths = rng.integers(3, length + 1, (count, *lead))
        x = rng.integers(0, 7, (count, *lead, length)).astype(np.uint8)
        full = None if kind == "image" else lengths
        return Fold.of(x, rng.integers(0, 3, count), full)

    grid = (3, 3) if kind == "image" else None
    return SymbolData.drawn(f"toy_{kind}", 0, [part(n) for n in FEW], 7, 3, grid=grid)


def cell_of(data: SymbolData, model: str = "softmax", **more) -> LongCell:
    config = experiment.PRESETS["smoke"]
    study = experiment.study_of(config, data.name, model, 8, data.length)
    return dataclasses.replace(study.grid[0], **more)


@pytest.mark.parametrize(
    ("kind", "model"),
    [("each", "softmax"), ("plain", "gru"), ("pairs", "cnn"), ("image", "cnn")],
)
def test_padding_says_nothing(kind, model):
    each = recall.recall((1, 3), keys=4, sizes=FEW)
    data = each if kind == "each" else whole(kind)
    task, cell = LongTask({data.name: data}), cell_of(data, model)
    program = task.program(cell)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32),
        task.initial_params(cell),
    )
    real = np.arange(data.length) < data.test.lengths[..., None]
    other = np.where(real, data.test.inputs, 1).astype(data.test.inputs.dtype)
    predict = jax.jit(program.more["predict"])
    found = predict(params, data.test)
    for one, two in zip(
        found, predict(params, data.test._replace(inputs=other)), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    asked = (data.test.labels != IGNORED).reshape(len(data.test.labels), -1).sum(1)
    assert found[1].tolist() == asked.tolist()
    trace_step(program, task.hyper(cell), task.batches(cell)[0])


def test_pairs_are_read_by_the_same_weights():
    data = whole("pairs")
    task, cell = LongTask({data.name: data}), cell_of(data)
    names = set(task.initial_params(cell)["tower"])
    assert names == {"input", "body", "head"}
    single = program_of(dataclasses.replace(task.shape(cell), pairs=False))
    body = single.initial_params(0)["tower"]["body"]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert count(body) == count(task.initial_params(cell)["tower"]["body"])
    assert cost_of(task.shape(cell))["flops"] > 2 * count(body)


def test_a_random_variant_trains_and_its_cost_is_known():
    data = recall.recall((1, 3), keys=4, sizes=FEW)
    task, cell = LongTask({data.name: data}), cell_of(data, "performer")
    found = task.costs(cell)
    params = sum(x.size for x in jax.tree.leaves(task.initial_params(cell)))
    assert found["params"] == params and found["flops"] > params
    task.rehearse([cell])


def test_span_is_the_distance_by_weights():
    data = whole()
    task, cell = LongTask({data.name: data}), cell_of(data)
    params = task.initial_params(cell)
    block = params["tower"]["body"]["encoder"]["blocks"][0]["attention"]
    flat = jax.tree.map(np.zeros_like, block["query"])
    block["query"] = flat  # every key has the same weight
    (spans,) = spans_of(task.shape(cell), params, data.test.take(slice(1)))
    n = data.test.lengths[0]
    away = np.abs(np.arange(n)[:, None] - np.arange(n)).mean()
    assert spans == pytest.approx([away] * 2, rel=1e-4)
    found = task.score(dataclasses.replace(cell, phase="final"), params)
    assert found["span"] == pytest.approx(np.mean(found["spans"]))


def test_pretraining_restores_what_is_masked_and_then_learns_the_task():
    data = whole("pairs")
    config = experiment.Config(
        self_pretrain=3, updates=5, widths=(8,), learning_rates=(3e-3,)
    )
    scratch, study = experiment.studies_of(config, {data.name: data.length})[:2]
    assert study.tuned_by is scratch and study.updates == 8
    cell = dataclasses.replace(study.grid[0], updates=8)
    assert "masked" in cell.config() and "masked" not in scratch.grid[0].config()
    task = LongTask({data.name: data})
    program, batches = task.program(cell), task.batches(cell)
    params, hyper = task.initial_params(cell), task.hyper(cell)
    loss = jax.jit(jax.value_and_grad(program.loss, has_aux=True))
    for step, restores in ((2, True), (3, False)):
        batch, first = batches[step]
        assert first.tolist() == [restores] * len(batch.labels)
        (found, _), slope = loss(params, (batch, first), jax.random.key(0), hyper)
        of_head = np.abs(slope["tower"]["head"]["contract"]["kernel"]).max()
        of_restore = np.abs(slope["restore"]["kernel"]).max()
        assert (of_restore > 0) == restores and (of_head > 0) == (not restores)
        assert found > 0
    assert task.score(cell, params)["val_loss"] == pytest.approx(np.log(3), rel=1e-4)
    with pytest.raises(ValueError, match="pretrain_updates must be 0 with bigram"):
        dataclasses.replace(cell, bigram=True)


def test_scores_count_each_sequence_once_and_each_group_by_itself():
    data = recall.recall((1, 3), keys=4, sizes=FEW)
    task, cell = LongTask({data.name: data}), cell_of(data, batch_size=4)
    params = task.initial_params(cell)  # zero logits: always class 0
    rows = task.predict(cell, params, data.test)
    assert rows.shape == (6, 3) and rows[:, 1].tolist() == data.test.groups.tolist()
    hits = (data.test.labels == 0).sum(axis=1)
    assert rows[:, 0].tolist() == hits.tolist()
    found = task.score(dataclasses.replace(cell, phase="final"), params)
    of_three = data.test.groups == 3
    assert found["test_accuracy_pairs_3"] == pytest.approx(hits[of_three].mean() / 3)
    assert found["test_loss"] == pytest.approx(np.log(4), rel=1e-5)
    assert "val_accuracy_pairs_1" in task.score(cell, params)


def test_a_linear_model_reads_what_can_be_counted():
    data = whole()
    x, y = baselines.features(data, data.test)
    assert x.shape == (6, 7) and np.allclose((x**2).sum(axis=1), 1)
    x, _ = baselines.features(whole("pairs"), whole("pairs").test)
    assert x.shape == (6, 4 * 7)
    x, _ = baselines.features(whole("image"), whole("image").test)
    assert x.shape == (6, 9) and x.max() == 1
    data = recall.recall((1, 3), keys=4, sizes=(40, 5, 6))
    x, y = baselines.features(data, data.train, 15)
    assert x.shape == (15, 2 * 8) and set(y) <= set(range(4))
    found = baselines.linear(data)
    assert 0 <= found["test_accuracy"] <= 1
    best = np.bincount(data.train.labels[data.train.labels >= 0]).argmax()
    share = (data.test.labels == best).sum() / (data.test.labels >= 0).sum()
    assert baselines.majority(data)["test_accuracy"] == pytest.approx(share)


def test_settings_that_cannot_be_are_told():
    for wrong, said in (
        (dict(models=()), "models must be softmax"),
        (dict(tasks=("listop",)), "tasks must be some of"),
        (dict(widths=(9,)), "num_heads must be a divisor of all widths"),
        (dict(attention="linear"), "attention must be none of models"),
    ):
        with pytest.raises(ValueError, match=said):
            experiment.Config(**wrong)
    with pytest.raises(ValueError, match="atention"):
        experiment.traits_of("linear_atention", experiment.Config(), 9)
    with pytest.raises(ValueError, match="attention must be left out for model 'gru'"):
        LongCell(task="t", model="gru", seed=0, updates=1, attention="linear")


def test_clothes_stand_in_for_photographs_that_cannot_be_had(monkeypatch, capsys):
    def image(name, sizes):
        if name == "cifar10":
            raise DataError("no network")
        return name, sizes

    monkeypatch.setattr(tasks, "_image", image)
    assert tasks.load("image", "paper")[0] == "fashion_mnist"
    assert "stands in for CIFAR-10: no network" in capsys.readouterr().err


def test_rows_go_by_model_then_task_and_rates_are_tried_from_the_middle():
    config = experiment.Config(models=("softmax", "gru"), attention="linear")
    assert config.rows == ("softmax", "gru", "linear")
    study = experiment.study_of(config, "t", "linear", 64, 512)
    assert [c.learning_rate for c in study.tuning()] == [1e-3, 3e-3, 1e-2]
    long = experiment.study_of(config, "t", "softmax", 64, 512)
    assert long.grid[0].attention == "blockwise"


def test_a_run_draws_what_it_found(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from attn_jax.attention import dot_product\n\n"
        "def attend(query, key, value, *, key_mask=None):\n"
        "    return dot_product(query, key, 2 * value, key_mask=key_mask)\n"
    )
    options = (
        f"--preset smoke --tasks recall --models softmax --widths 4 8 --attention "
        f"{mine}:attend --learning-rates 0.003 --engine inline --out {tmp_path}"
    )
    assert run.run(experiment.EXPERIMENT, options.split()) == 0
    records = ResultsStore(tmp_path).records()
    assert all(r["status"] == "done" for r in records)
    written = (tmp_path / "report.md").read_text("utf-8")
    assert "| mine.py:attend |" in written and "| majority |" in written
    assert "(recall.png)" in written and (tmp_path / "recall.png").stat().st_size > 5000
    assert written == (REPORT.write(records, tmp_path), written)[1]
