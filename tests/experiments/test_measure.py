"""Programs beside an experiment: what they measure, and the files that reports read."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from attn_jax import inputs
from experiments.attention_vs_rnn import generating, parallel
from experiments.attention_vs_rnn import timing as decoders
from experiments.core.measure import Folder, measures
from experiments.data import sequence_tasks, speech
from experiments.graphs import timing as graphs
from experiments.graphs.experiment import PRESETS
from experiments.sequence_labelling import ablation, heads, report, streaming
from experiments.sequence_labelling import experiment as labelling_experiment
from experiments.tasks import labelling


def measure(folder: Folder, *, turns: int = 3, seconds: tuple[float, ...] = (1.0,)):
    """Measures nothing.

    Args:
      folder: of the results.
      turns: how often.
      seconds: how long.
    """
    if turns < 1:
        raise FileNotFoundError(f"{folder} holds nothing.")
    return dict(turns=turns, seconds=seconds)


def test_arguments_are_flags_and_what_is_measured_a_file(tmp_path, capsys):
    main = measures("found.json", measure)
    folder = tmp_path / "new"
    assert main([str(folder), "--turns", "4", "--seconds", "1", "2"]) == 0
    found = json.loads((folder / "found.json").read_text())
    assert (found["turns"], found["seconds"]) == (4, [1.0, 2.0])
    assert found["provenance"]["python"] and found["wall_time_s"] >= 0
    assert main([str(tmp_path / "none"), "--turns", "0"]) == 2
    assert "none holds nothing" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "how often" in capsys.readouterr().out


def test_an_image_is_timed_by_its_positions():
    sizes = generating.SMALL_MODEL
    (cached,) = generating.whole_images(["linear"], sizes, 2, 1)
    assert cached["images_per_s"] == pytest.approx(2 / cached["seconds"][0])
    for in_place in (True, False):
        seconds = generating.by_position(
            "softmax", sizes, 2, [0, 15], 1, in_place=in_place
        )
        assert len(seconds) == 2 and min(seconds) > 0
    found = generating.growth((((2, 2), (4, 2)), 4), sizes, 1, 1)
    assert [row["length"] for row in found["images"]] == [4, 4]
    assert found["tokens"]["positions"] == [0, 3, 7]
    assert {len(found["tokens"]["seconds"][m]) for m in ("softmax", "linear")} == {3}
    whole = generating.uncached_images(sizes, 1, [8, 16], 1)
    first, second = whole["seconds_at"]
    rising = [first * t / 8 for t in range(1, 9)]
    rising += [first + (second - first) * t / 8 for t in range(1, 9)]
    assert whole["seconds"] == [pytest.approx(sum(rising))]


def test_a_step_is_split_over_devices_and_its_chain_counted(monkeypatch):
    (row,) = parallel.split_steps(
        "tokens", ["lstm"], [1], parallel.SMALL_SIZES, 1, 8, 2
    )
    assert row["devices"] == 1
    assert row["loop_turns"] >= 16  # 8 tokens, there and back
    assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
    monkeypatch.setattr(parallel, "MIXERS", {"softmax": parallel.MIXERS["softmax"]})
    rows = parallel.chains([8, 16], parallel.SMALL_SIZES, [])
    assert [row["program"] for row in rows] == ["forward", "train step"] * 2
    one, two = ([r["operations"] for r in rows if r["length"] == n] for n in (8, 16))
    assert one == two and one[0] < one[1]
    assert rows[0]["exact"] and rows[0]["flops"] > 0


def test_what_needs_too_much_is_told_and_not_run(monkeypatch):
    monkeypatch.setattr(decoders, "SCALING", ("dot_product",))
    monkeypatch.setattr(decoders, "MOST_BYTES", 8 * 64 * 64 * 4)
    rows = decoders.scaling([16, 128, 256], 1)
    assert [row["length"] for row in rows] == [16, 128]
    assert rows[0]["seconds"] > 0
    assert rows[1]["skipped"].startswith("needs")
    assert "seconds" not in rows[1]


def test_time_and_memory_of_a_graph_are_measured(optimized):
    few = dataclasses.replace(
        PRESETS["cpu"], node_ns=(50,), node_features=4, node_dim=4, node_depth=1
    )
    found = graphs.measure(graphs.RANDOM, few, 4_000)
    assert found["nodes"] == 1_000 and found["edges"] == 5_000
    assert found["seconds"] > 0 and found["program_bytes"] > 0
    assert found["peak_bytes"] > 5e7


def test_a_head_that_is_taken_away_has_no_weights_that_count(tmp_path, monkeypatch):
    data = sequence_tasks.load_task("toy_pos")
    smoke = labelling_experiment.PRESETS["smoke"]
    cell = labelling_experiment.base_cell(smoke, "toy_pos", "transformer")
    key = labelling.program_key(cell, data)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32),
        labelling.program_of(key).initial_params(0),
    )
    model = streaming.labeller_of(cell, data, params, data.max_length)
    longest = int(np.bincount(data.test.lengths).argmax())
    monkeypatch.setattr(heads, "LENGTH", longest)
    found = dict(seed=0) | heads.look(model, data, data.test, 256)
    predicted, _ = labelling.LabelTask(data).predict(cell, params, data.test)
    accuracy = labelling.scores(data.test, predicted)["accuracy"]
    assert found["whole"]["accuracy"] == pytest.approx(accuracy)
    assert np.shape(found["offsets"]) == (1, 2, 2 * heads.REACH + 1)
    # Without the first head: as if its values did not reach the output.
    kernel = streaming.encoder_of(model).blocks[0].attention.out.kernel
    kernel[...] = kernel[...].at[0].set(0.0)
    without = heads.look(model, data, data.test, 256)["whole"]
    assert found["without"][0][0] == without != found["whole"]

    monkeypatch.setattr(ablation, "FEWEST", 1)
    measured = dict(cell=cell.config(), tags=list(data.class_names), seeds=[found] * 2)
    measured |= dict(length=longest, reach=heads.REACH)
    (tmp_path / ablation.HEADS).write_text(json.dumps(measured))
    told = "\n".join(ablation.draw_heads(report.Group([], [], tmp_path, [])))
    assert "| 0 | layer 1, head 2 |" in told and "2 seeds" in told
    assert (tmp_path / "heads.png").stat().st_size > 5_000


def test_heads_that_look_elsewhere_are_apart():
    def head(layer, *offsets):
        return ablation.Head(0, layer, 1, np.array(offsets), 0.0, np.zeros(2))

    one, other, half = head(1, 1.0, 0, 0), head(1, 0, 0, 1.0), head(1, 0.5, 0, 0.5)
    assert (one.main, other.main) == (-1, 1)
    assert ablation.apart([one, other]) == 1.0 and ablation.apart([one, one]) == 0.0
    assert ablation.apart([one, half, head(2, 0, 1.0, 0)]) == 0.5


def test_sound_is_labelled_as_it_comes_as_it_is_as_a_whole():
    data = sequence_tasks.load_task("toy_phones")
    signal = speech.toy_speech(1, seed=3).audio[0]
    cell = labelling_experiment.base_cell(
        labelling_experiment.PRESETS["smoke_phones"],
        "toy_phones",
        "transformer",
        attention="truncated",
        left=4,
        right=2,
    )
    program = labelling.program_of(labelling.program_key(cell, data))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32),
        program.initial_params(0),
    )
    model = streaming.labeller_of(cell, data, params, 10_000)
    mean, std = np.zeros(120, np.float32), np.ones(120, np.float32)
    stream = streaming.SoundLabeller(model, mean, std, chunk=4)
    assert stream.delay == 2 + 4  # one layer, and the differences of the features
    parts = list(stream.logits(signal))
    assert not len(parts[0])  # nothing is known before its look-ahead has come
    count = inputs.num_frames(len(signal), stream.window, stream.hop)
    whole = streaming.offline(model, signal, mean, std, length=count + 3)
    assert np.concatenate(parts).shape == whole.shape
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="signal must have at least 400 samples"):
        next(stream.logits(signal[:399]))
