"""What each experiment's report says of records, which are written here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments.attention_as_conv import report as conv
from experiments.attention_vs_rnn import report as rnn
from experiments.attention_vs_rnn import speed
from experiments.core import plots
from experiments.core.report import rows_of
from experiments.data.images import pack
from experiments.graphs import report as graphs
from experiments.positions import report as positions
from experiments.sequence_labelling import report as labelling

CURVES = dict(step=[1, 2], loss=[1.0, 0.5], accuracy=[0.1, 0.2])


def record(seed=0, phase="final", curves=CURVES, **fields):
    """A finished record; `m_` marks metrics, the rest is config."""
    metrics = {k[2:]: v for k, v in fields.items() if k.startswith("m_")}
    config = {k: v for k, v in fields.items() if not k.startswith("m_")}
    config |= {"seed": seed, "phase": phase}
    return dict(config=config, metrics=metrics, status="done", curves=curves)


def floor(task, model, **metrics):
    return record(phase="baseline", task=task, model=model, **metrics)


def seeds(metric, value, **fields):
    """Three seeds about a value."""
    return [
        record(s, **fields, **{f"m_{metric}": value + 1e-4 * (s - 1)}) for s in range(3)
    ]


def told(report, records, folder):
    report.REPORT.write(records, folder)
    return (folder / "report.md").read_text(encoding="utf-8")


# --- positions ------------------------------------------------------------------------

SHORT, LONG = "test_accuracy_length_1_9", "test_accuracy_length_10_20"


def encodings(**shortest):
    return [
        row
        for name, mean in shortest.items()
        for row in rows_of(seeds(SHORT, mean, positions=name))
    ]


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_the_order_is_learnt_from_midway_between_none_and_the_best(scale):
    group = encodings(none=0.9 - scale / 2, shaw=0.9, learned=0.9 - 0.45 * scale)
    assert positions.threshold(group, SHORT) == pytest.approx(0.9 - scale / 4)


def test_nothing_is_learnt_where_none_is_clearly_behind():
    assert positions.threshold(encodings(none=0.9, shaw=0.9), SHORT) == math.inf
    assert positions.threshold(encodings(shaw=0.9), SHORT) == 0.0


def test_what_was_not_learnt_or_cannot_be_told_is_no_induction(tmp_path):
    # ALiBi is the best here, which tells nothing of what the others learnt.
    found = dict(
        none=0.9, sinusoidal=0.93, shaw=0.92, rope=0.93, learned=0.901, alibi=1
    )
    fall = dict(shaw=0.05, rope=0.3)
    sizes = dict(dim=8, num_heads=2, depth=3, tokens=64, position_options={})
    more = dict(task="words", learning_rate=1e-3, train_length=9, updates=5) | sizes
    records = [
        record(s, positions=name, **more, **{f"m_{SHORT}": x, f"m_{LONG}": x - drop})
        for name, short in found.items()
        for s in range(3)
        for x, drop in [(short + 1e-4 * s, fall.get(name, 0.1) + 1e-5 * s * s)]
    ]
    records.append(floor("words", "majority", **{f"m_{SHORT}": 0.2}))
    records.append(floor("words", "trained_positions", **{f"m_{LONG}": 0.8}))
    measured = {"rope": {"ratio": 1.25}, "shaw": {"ratio": 1.5}}
    measured["sinusoidal_floater, adjoint"] = {"ratio": 1.75}
    timed = dict(turns=3, tokens=64, length=8, encodings=measured)
    (tmp_path / positions.MEASURED).write_text(json.dumps(timed))
    written = told(positions, records, tmp_path)
    table, per_task = (
        {
            cells[1].strip(): [cell.strip() for cell in cells[2:]]
            for line in part.splitlines()
            if (cells := line.split("|"))[0] == "" and len(cells) > 2
        }
        for part in written.split("## words")
    )
    assert table["none"][:2] == ["–", "✗ 0"] and table["ALiBi"][0] == "void"
    assert table["Shaw"][0] == "✓ .50" and table["RoPE"][0] == "✗ 3.00"
    assert table["sinusoid"][0] == "= 1.00"
    # 8 numbers a position: a table grows with the longest sequence, the others do not.
    learned = ["not learnt", "✓ 1,024", "✗ 131,072", "✗ ✓ ✗"]
    assert table["learned table"][:4] == learned
    assert table["Shaw"][1:4] == ["✓ 1,584", "✓ 1,584", "✗ ✓ ✓"]
    assert per_task["Shaw"][3].startswith("−.050 (+.050 [+.05")
    assert per_task["sinusoid"][2:4] == ["+.030 [+.030, +.030]", "−.100"]
    assert per_task["Shaw"][4].startswith("+.070 [+.070")
    assert per_task["Shaw"][6] == "+50 %" and per_task["learned table"][6] == "–"
    assert per_task["most frequent label"][:2] == [".200", "–"]
    assert "FLOATER, adjoint: +75 % time of a step." in written
    for name in ("lengths_words", "parameters"):
        assert (tmp_path / f"{name}.png").is_file()


# --- labelling ------------------------------------------------------------------------

LABELLER = dict(
    model="transformer",
    window=None,
    left=None,
    right=None,
    n=None,
    updates=9,
    num_heads=4,
    depth=2,
    attention="dot_product",
    positions="rope",
    learning_rate=1e-3,
)


def labellers(task, variants, metric="test_accuracy", **more):
    return [
        found
        for change, mean in variants
        for found in seeds(metric, mean, task=task, **(LABELLER | change), **more)
    ]


def test_models_behind_a_baseline_are_said_first(tmp_path):
    records = labellers("pos", [({}, 0.9), (dict(model="window", window=0), 0.8)])
    low, high = (floor("pos", "most_frequent", m_test_accuracy=x) for x in (0.85, 0.95))
    written = told(labelling, [*records, low], tmp_path)
    said = "**Not ahead of the baseline most frequent (.8500): fully connected, each"
    assert said in written and written.index(said) < written.index("## Models")
    written = told(labelling, [*records, high], tmp_path)
    assert "**No model beats the baseline most frequent (.9500):" in written


def test_encodings_worse_than_none_and_other_scores_are_told(tmp_path):
    whole = labellers("pos", [({}, 0.9)])
    varied = [
        (dict(positions="none"), 0.5),
        (dict(positions="sinusoidal"), 0.4),
        (dict(positions="rope"), 0.6),
        (dict(positions="t5"), 0.7),
        (dict(attention="additive", positions="t5"), 0.55),
        (dict(attention="additive"), 0.54),
    ]
    varied = [(change | dict(n=100, updates=3), mean) for change, mean in varied]
    written = told(labelling, [*whole, *labellers("pos", varied)], tmp_path)
    assert "sinusoidal −.1000 [−.1000, −.1000], **worse than none**" in written
    assert "rope +.1000 [+.1000, +.1000]; sinu" in written
    assert "its own tuning chose: −.1500 [−.1500, −.1500]." in written
    assert "no fair comparison with RoPE" in written
    written = told(labelling, [*whole, *labellers("pos", varied[:3])], tmp_path)
    assert "dot products" not in written


def test_whole_utterances_stand_beside_their_crops(tmp_path):
    variants = [({}, 0.9), (dict(model="gru"), 0.8)]
    cut = told(labelling, labellers("phones", variants), tmp_path)
    assert "| model | crops of 2.56 s |" in cut and "whole utterances" not in cut
    both = [
        *labellers("phones", variants[:1], m_test_whole_accuracy=0.5),
        *labellers("phones", variants[1:], m_test_whole_accuracy=0.7),
    ]
    written = told(labelling, both, tmp_path)
    assert "| model | whole utterances | crops of 2.56 s |" in written
    assert written.index("| bidirectional GRU | .7000") < written.index("| Transformer")


def test_windows_and_sizes_are_varied_apart_from_the_models(tmp_path):
    costs = dict(m_train_accuracy=0.95, m_params=1000, m_input_params=10)
    window = dict(model="window", window=2)
    variants = [({}, 0.9), (window, 0.8)]
    records = labellers("pos", variants, **costs, m_n=50_000)
    small = dict(n=5_000, updates=3)
    variants = [(small | window | dict(window=w), 0.7 - 0.01 * w) for w in (1, 2, 9)]
    records += labellers("pos", [(small, 0.6), *variants], **costs, m_n=5_000)
    tiny = [(dict(n=500, updates=3), 0.4), (window | dict(n=500, updates=3), 0.5)]
    records += labellers("pos", tiny, **costs, m_n=500)
    written = told(labelling, records, tmp_path)
    assert "## The window: 5,000 training sequences, 3 updates" in written
    assert "| ±9 | .6100 ± .0001 | .9500 ± .0000 | 1,000 | 990 |" in written
    assert "| model | N = 500 | N = 5,000 |" in written
    assert "| fully connected, window ±2 | .5000 ± .0001 | .6800 ± .0001 |" in written
    for name in ("window_5000", "scaling"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000


# --- heads and convolution ------------------------------------------------------------


def test_measures_of_a_convolution_and_of_a_blur():
    places = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1)
    centres = np.stack([places.reshape(9, 2), 0.5 + 2 * places.reshape(9, 2)])
    precisions = np.stack([24.0 * np.eye(2)] * 9 + [np.eye(2)] * 9).reshape(2, 9, 2, 2)
    found = conv.grid_measures(centres, precisions)
    assert found["distinct"].tolist() == [9, 9]
    assert found["in_3x3"].tolist() == [1.0, pytest.approx(1 / 9)]
    assert found["one_token"].tolist() == [1.0, 0.0]
    np.testing.assert_allclose(found["distance"], [0.0, np.sqrt(0.5)])
    # Four tokens are nearest to a centre in the middle of them.
    side = np.arange(-20, 20) + 0.5
    line = np.exp(-0.5 * side**2)
    np.testing.assert_allclose(found["peak"][1], (line / line.sum()).max() ** 2)


def test_chance_is_that_of_a_place_anywhere():
    places = np.random.default_rng(0).uniform(-5, 5, (200_000, 2))
    apart = np.linalg.norm(places - np.round(places), axis=-1).mean()
    assert abs(apart - conv.CHANCE) < 1e-3


@pytest.mark.parametrize(
    ("end", "answer"), [((5.0, 0.0), "yes"), ((1.0, 0.0), "no"), ((5.0, 0.4), "no")]
)
def test_the_verdict_follows_its_rule(end, answer):
    """Of heads that went from one (spread, shift) to another."""
    places = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1)
    ends = [(1.0, 0.4), end]
    centres = [(places.reshape(1, 9, 2) + shift).tolist() for _, shift in ends]
    precisions = [np.tile(s**2 * np.eye(2), (1, 9, 1, 1)).tolist() for s, _ in ends]
    curves = dict(observed_at=[0, 5], centres=centres, precisions=precisions)
    some = dict(model="quadratic", start="random", n=10, updates=5, curves=curves)
    *_, text = conv.verdict(rows_of(seeds("test_accuracy", 0.5, **some)))
    assert f"**{answer}**" in text


def test_a_baseline_counts_at_the_number_of_images_that_it_saw():
    def svm(used, accuracy):
        more = dict(m_baseline="rbf_svm", m_n=60_000, m_n_used=used)
        return floor("mnist", "rbf_svm n=60000", m_test_accuracy=accuracy, **more)

    capped, whole = svm(10_000, 0.829), svm(60_000, 0.844)
    assert conv.baselines([capped]) == {}
    assert conv.baselines([capped, whole])[60_000]["rbf_svm"].mean == 0.844


# --- recurrent networks ---------------------------------------------------------------


def timing():
    """What the timing program would write, without measuring it."""
    speeds = (("softmax", 0.5), ("linear", 2.0), ("lstm", 1.0))
    images = [
        dict(model=m, batch=1, length=784, seconds=[1, 1, 1], images_per_s=x)
        for m, x in speeds
    ]
    images.append(images[0] | dict(model="softmax, uncached", images_per_s=0.02))
    images[-1]["lengths"] = [2, 4]
    tokens = dict(softmax=[1e-3, 5e-3], linear=[1e-3, 1e-3])
    scaling = [
        dict(name=n, length=t, seconds=1e-3 * t, temp_bytes=1024 * t)
        for n in speed.SCALING_NAMES
        for t in (512, 1024)
    ]
    scaling[-1] = dict(name="reformer", length=1024, skipped="needs 9 GiB")
    return dict(
        sizes=dict(length=784, dim=256, depth=8, num_heads=8, components=10),
        images=images,
        copied=[dict(batch=1, positions=[0, 783], seconds=[0.01, 0.01])],
        growth=dict(
            images=[x for x in images if x["model"] in tokens],
            tokens=dict(positions=[0, 3_999], seconds=tokens),
        ),
        tokens=dict(
            positions=[0, 5], batch=1, seconds=dict(softmax=[1, 2], linear=[1, 1])
        ),
        scaling=scaling,
        train_steps=[
            dict(model=m, length=t, batch=2, seconds=t)
            for m in ("linear", "lstm")
            for t in (8, 16)
        ],
        train_sizes=dict(depth=1, dim=8),
        cores=2,
    )


def counted():
    """What the program that counts chains would write."""
    chain = dict(exact=True, flops=5, loop_turns=3)
    return dict(
        sizes=dict(dim=8, depth=1),
        chunk=32,
        chains=[
            dict(model=m, length=t, program=p, operations=n * t, rounds=t, **chain)
            for m, n in (("softmax", 1), ("lstm", 7))
            for t in (8, 16)
            for p in ("forward", "train step")
        ],
        devices=[
            dict(split="tokens", model="lstm", devices=n, batch=1, length=16)
            | dict(loop_turns=32, device_flops=1e6 / n, seconds=[0.3, 0.2])
            for n in (1, 2)
        ],
        cores=2,
    )


def test_decoders_are_timed_drawn_and_set_beside_the_paper(tmp_path):
    (tmp_path / speed.TIMING).write_text(json.dumps(timing()))
    (tmp_path / speed.PARALLEL).write_text(json.dumps(counted()))
    sizes = dict(depth=1, dim=8, updates=2, batch_size=4, components=3, height=4)
    sizes |= dict(length=16, test_size=9, m_flops=1e6, m_params=7, num_heads=2)
    sizes |= dict(learning_rate=1e-3)
    drawn = {k: pack(np.zeros((1, 16))) for k in ("m_samples", "m_completions")}
    drawn["m_completed"] = drawn["m_samples"]
    copied = dict(task="copy", m_test_loss=1.0, m_test_whole=0.0)
    records = seeds("test_accuracy", 0.05, model="lstm", **sizes, **copied)
    records += seeds("test_accuracy", 0.9, model="linear", **sizes, **copied)
    narrow = sizes | copied | dict(num_heads=4)
    records += seeds("test_accuracy", 0.7, model="linear", **narrow)
    tried = dict(task="copy", model="lstm", learning_rate=1e-3, updates=2)
    records += [
        record(phase="tune", **tried | dict(learning_rate=x)) for x in (1e-3, 1)
    ]
    images = dict(task="toy", m_val_bits=3.0)
    sizes["updates"] = rnn.LEARNT
    records += seeds("test_bits", 3.0, model="linear", **sizes, **images, **drawn)
    guess = dict(m_test_loss=2.3, m_test_accuracy=0.1)
    records.append(floor("copy", "uniform guess", **guess))
    records.append(floor("toy", "histogram", m_test_bits=4.0, m_val_bits=4.0))
    text = told(rnn, records, tmp_path)
    for part in (
        "| softmax attention, uncached | 1 | 0.02 | 100× | 0.45 | 317× |",
        "| softmax attention, cache written in place | 1 | 0.5 | 4× | – | – |",
        "cache copied for every token | 1 | 0.128 | 15.7× | 7.56 | 18.9× |",
        "| whole images drawn | – |",
        "| from the time of a token | 3× |",
        "2.54 at N = 3,072 and the paper's 18.9 at N = ",
        "cache written in place 2.00×, linear attention 1.00×",
        "needs 9 GiB",
        "| LSTM | 56 | 112 |",
        "| LSTM, tokens split | 1.00 of the FLOPs, 32 turns, 200 ms | 0.50 of the",
        "| uniform guess | 2.300 | .100 | 0 | – |",
        "linear attention, heads of 4, with Student's interval of 95 % over seeds",
        "linear attention, heads of 2 −.200",
        "**At an end of these: ",
        "**Not better than a uniform guess: LSTM.**",
        "| linear attention, heads of 4 | 1.000 ± .000 | .900 ± .000 |",
        "| linear attention | 3.000 ± .000 |",
    ):
        assert part in text, part
    wanted = "copy images samples completions tokens scaling train_steps".split()
    wanted += ["lead", "chains", "devices"]
    assert {p.stem for p in tmp_path.glob("*.png")} == set(wanted)


# --- graphs ---------------------------------------------------------------------------

GRAPH = dict(updates=20, learning_rate=1e-2, num_heads=1, score="gatv2", depth=2)
LOOKUP = GRAPH | dict(task="dictionary", graphs=64)


def test_the_report_says_who_is_ahead_and_who_is_not(tmp_path):
    node = GRAPH | dict(task="wordnet", model="gatv2", n=40, shown=0.5)
    molecule = GRAPH | dict(task="melting_point", model="all pairs")
    molecule |= dict(m_test_mae=40.0, m_test_r2=0.5, m_train_rmse=30.25, m_n=5)
    lookup = LOOKUP | dict(model="gatv2", keys=3, m_train_accuracy=1.0)
    records = []
    for seed, (accuracy, rmse) in enumerate([(0.90, 50.0), (0.92, 52.0), (0.94, 54.0)]):
        guess = dict(m_test_predictions=[10.0 + seed, 20.0])
        records += [
            record(seed, **node, m_test_accuracy=accuracy, m_params=7),
            record(seed, **molecule, m_test_rmse=rmse, **guess),
            record(seed, **lookup, m_train_whole_graphs=1.0, m_test_accuracy=0.99),
        ]
    scores = dict(m_test_mae=1.0, m_test_r2=0.0)
    spread = dict(m_test_accuracy_40=0.93, m_chosen_40="50 steps")
    right = dict(m_test_rmse=90.0, m_test_targets=[11, 21], **scores)
    records += [
        floor("wordnet", "majority", m_test_accuracy_40=0.3),
        floor("wordnet", "label_propagation", **spread),
        floor("melting_point", "mean", **right),
        floor("melting_point", "forest", m_test_rmse=60.5, **scores),
    ]
    text = told(graphs, records, tmp_path)
    for part in (
        ".9200 ± .0200",
        "GATv2 (.9200) does not beat label propagation, all edges (.9300)",
        "52.00 ± 2.00",
        "| all pairs | −8.50 | +39.00 |",
        "no network (.9200 at best) beats label propagation, all edges (.9300).**",
        "30.25 ± .00",
        "| label propagation, all edges | .9300 | 50 steps |",
        "### k = 3: 64 training graphs",
    ):
        assert part in text, part
    wanted = {"dictionary", "wordnet", "melting_point"}
    assert {p.stem for p in tmp_path.glob("*.png")} == wanted


def test_a_model_has_one_colour_in_every_panel_and_each_a_legend(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: drawn.update({path.name: figure})
    )
    records = []
    # Of other keys the other model is ahead, and a third one is there as well.
    for keys, order in ((3, ("gat", "gatv2")), (4, ("gatv2", "no edges", "gat"))):
        for place, model in enumerate(order):
            some = LOOKUP | dict(keys=keys, model=model)
            records += seeds("train_accuracy", 0.5 + 0.1 * place, **some)
    told(graphs, records, tmp_path)
    panels = drawn["dictionary.png"].axes
    assert len(panels) == 2
    colours: dict[str, set[str]] = {}
    for axes in panels:
        named = {line.get_label(): line.get_color() for line in axes.get_lines()}
        assert {text.get_text() for text in axes.get_legend().get_texts()} == set(named)
        for name, colour in named.items():
            colours.setdefault(name, set()).add(colour)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(colours) == 3
