from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
from flax import nnx

from attn_jax import models
from attn_jax.tools.cost import model_cost
from experiments.core import plots
from experiments.core.store import config_hash
from experiments.data_scaling import lines, report

SIZES = (100, 1_000, 10_000, 30_000)
VIT = {n: 0.95 - 2.0 * n**-0.45 for n in SIZES}  # overtakes
CNN = {n: 0.93 - 1.2 * n**-0.40 for n in SIZES}
SCENES = "scenes-pointer-3x3-4cells-10classes-10px"


@pytest.fixture(autouse=True)
def flops_as_stored(request, monkeypatch):
    """Records here say what they like of their FLOPs."""
    if "recounted" not in request.node.name:
        monkeypatch.setattr(lines, "forward_flops", lambda config: None)


def record(status="done", provenance=None, curves=None, wall_time_s=60.0, **fields):
    """Make a record; `m_` marks metrics, the rest is config."""
    config = {k: v for k, v in fields.items() if not k.startswith("m_")}
    return {
        "schema": 1,
        "hash": config_hash(config),
        "config": config,
        "status": status,
        "metrics": {k[2:]: v for k, v in fields.items() if k.startswith("m_")},
        "curves": curves or {},
        "wall_time_s": wall_time_s,
        "provenance": {
            "git_commit": "a" * 40,
            "git_dirty": False,
            "versions": {"jax": "0.10.2"},
            "platform": "cpu",
            "device": "cpu",
            "python": "3.11.7",
            "created_utc": "2026-01-01T00:00:00+00:00",
        }
        | (provenance or {}),
    }


def final(model, n, seed, accuracy, **more):
    fields = {
        "phase": "final",
        "task": "fashion_mnist",
        "size": "mu",
        "attention": None,
        "protocol": "updates",
        "updates": 500,
        "batch_size": 50,
        "learning_rate": 1e-3,
        "m_params": 200_000 if model == "vit" else 100_000,
        "m_flops": 10e6 if model == "vit" else 9e6,
    }
    fields |= {"model": model, "n": n, "seed": seed, "m_test_accuracy": accuracy}
    return record(**(fields | more))


def baseline(model, n, accuracy, seed=0, **more):
    fields = {"phase": "baseline", "task": "fashion_mnist", "model": model, "n": n}
    return record(**(fields | {"seed": seed, "m_test_accuracy": accuracy} | more))


def curves(model, accuracies, seeds=3, **more):
    return [
        final(model, n, s, a + 0.002 * (s - 1), **more)
        for n, a in accuracies.items()
        for s in range(seeds)
    ]


def pair(**more):
    return [*curves("vit", VIT, **more), *curves("resnet", CNN, **more)]


def text(records, tmp_path, drawn=None, shown=None):
    """Write the report without its figures, which take most of the time.

    What they would show is put into `drawn`, by name; what the terminal does, `shown`.
    """

    def keep(series, path, **more):
        if drawn is not None:
            drawn[path.stem] = more | {"series": series}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "curve", keep)
        said = report.REPORT.write(records, tmp_path)
    if shown is not None:
        shown["terminal"] = said
    return (tmp_path / "report.md").read_text()


def row(written, n, heading="### Test accuracy"):
    part = written.split(heading, 1)[1]
    return next(x for x in part.splitlines() if x.startswith(f"| {n:,} "))


# --- the whole ---------------------------------------------------------------------


def test_the_terminal_shows_the_tables_of_accuracy(tmp_path):
    lost = baseline("rbf_svm", 100, 0.99)
    shown = {}
    text([*pair(), lost], tmp_path, shown=shown)
    out = shown["terminal"]
    assert "Fashion-MNIST: test accuracy" in out
    assert "ViT-mu at N = 100 (.698) loses to RBF-SVM (.990)." in out
    assert "**" not in out
    table = [x for x in out.splitlines() if x.startswith("|")]
    assert len({len(x) for x in table}) == 1


def test_means_spreads_and_seeds_are_those_of_the_records(tmp_path):
    written = text(pair(), tmp_path)
    assert f"{VIT[1_000]:.3f}"[1:] + " ± .002 (3)" in row(written, 1_000)
    assert row(written, 1_000).count("**") == 2  # the better network is bold
    assert "fewer than 3 seeds" not in written
    for part in (
        "an equal number of optimiser updates for every N",
        "Optimiser updates: 500 at every N.",
        "epochs of 250 at N = 100, 25 at N = 1,000",
        "Seeds: 0, 1, 2.",
        "![curve](curve.png)",
        "![gap](gap.png)",
        "`learning_rate=0.001`",
        "jax 0.10.2",
        "24 final done",
    ):
        assert part in written
    assert str(tmp_path) not in written


def test_the_gap_and_the_crossing_are_stated(tmp_path):
    written = text(pair(), tmp_path)
    gap = row(written, 100, "### Gap: ViT-mu − ResNet-mu")
    expected = VIT[100] - CNN[100]
    assert (
        f"−{abs(expected):.3f}".replace("0.", ".") in gap and "ResNet-mu ahead" in gap
    )
    assert "ViT-mu ahead" in row(written, 30_000, "### Gap")
    assert "gets ahead, and stays ahead, between N = 100 and 1,000" in written
    assert "it is clearly behind at 100, clearly ahead from 1,000 on" in written
    assert "N*" not in written and "bootstrap" not in written
    assert "| ViT-mu    | .950" in written and "| ResNet-mu | .930" in written


def test_sizes_say_how_they_are_matched(tmp_path):
    written = text(pair(), tmp_path)
    assert (
        "forward FLOPs × 1.11 (matched; within × 1.25 counts), parameters × 2.00"
        in (written)
    )
    apart = [*curves("vit", VIT, m_flops=20e6), *curves("resnet", CNN)]
    assert "FLOPs are **not matched**" not in written
    written = text(apart, tmp_path)
    assert "forward FLOPs × 2.22 (**not matched**" in written
    assert "(ratio outside 1.25) for ViT-mu / ResNet-mu (× 2.22)" in written


def test_flops_are_recounted_whatever_a_record_holds(tmp_path):
    def cost(model, n=100, **more):
        return [final(model, n, s, 0.8, m_flops=1.0, **more) for s in range(3)]

    records = [*cost("vit", patch=7), *cost("resnet")]
    written = text(records, tmp_path)
    expected = [
        model_cost(
            models.build(
                name, "mu", image_shape=(28, 28, 1), num_classes=10, rngs=nnx.Rngs(0)
            ),
            (28, 28, 1),
        ).flops
        for name in ("vit", "resnet")
    ]
    assert f"forward FLOPs × {expected[0] / expected[1]:.2f}" in written
    assert all(r["metrics"]["flops"] == 1.0 for r in records)
    # Of these nobody but the record knows the shape, or the variant.
    for more in (
        dict(task="npz:mine@0123"),
        dict(attention="gone.py:attend", attention_sha256="0"),
    ):
        assert lines.forward_flops(cost("vit", **more)[0]["config"]) is None


def test_the_receptive_field_of_the_cnn_stands_beside_attention(tmp_path):
    records = [*curves("vit", VIT), *curves("resnet", CNN, m_receptive_field=23)]
    rows = text(records, tmp_path).split("### Sizes")[1].splitlines()
    assert "receptive field (pixels)" in rows[2]
    assert "| whole image " in rows[4] and "| 23 " in rows[5]


def test_a_gap_is_taken_to_every_cnn_the_nearest_in_flops_first(tmp_path):
    records = pair() + curves("resnet", CNN, size="b", m_flops=90e6)
    records += curves("hybrid", VIT, m_flops=90e6)
    written = text(records, tmp_path)
    heads = [x for x in written.splitlines() if x.startswith("### Gap")]
    assert heads == [
        "### Gap: ViT-mu − ResNet-mu",
        "### Gap: ViT-mu − ResNet-b",
        "### Gap: Hybrid-mu − ResNet-b",
        "### Gap: Hybrid-mu − ResNet-mu",
    ]
    assert "- **ViT-mu and ResNet-b.**" in written


def test_many_gaps_leave_the_figure_to_the_nearest_cnn(tmp_path):
    drawn = {}
    records = pair() + curves("resnet", CNN, size="b", m_flops=90e6)
    for name in "abc":
        records += curves("vit", VIT, attention=name)
    (section,) = lines.make_sections(records)
    text(records, tmp_path, drawn)
    assert len(section.pairs) == 8 and len(drawn["gap"]["series"]) == 4
    assert all(x.label.endswith("ResNet-mu") for x in drawn["gap"]["series"])
    assert "nearest in FLOPs alone" in drawn["gap"]["note"]


def test_two_cnns_are_told_apart_by_their_receptive_field(tmp_path):
    more = {"task": SCENES, "m_flops": 9e6}
    records = curves("vit", VIT, **more)
    records += curves("resnet", CNN, m_receptive_field=47, **more)
    one = text(records, tmp_path)
    assert "(field" not in one
    records += curves("resnet", CNN, size="mu_item", m_receptive_field=15, **more)
    written = text(records, tmp_path)
    assert "### Gap: ViT-mu − ResNet-mu (field 47 px and group norms)" in written
    assert "### Gap: ViT-mu − ResNet-mu_item (field 15 px and group norms)" in written
    spans = [x for x in written.splitlines() if x.startswith("A relation spans 20")]
    assert "is 47 pixels, which covers it" in spans[0]
    assert "is 15 pixels, which is narrower" in spans[1]
    assert "relation spans (pixels)" in written.split("### Sizes")[1]


# --- honesty -----------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_marked_everywhere(tmp_path, seeds):
    written = text(pair(seeds=seeds), tmp_path)
    marked = row(written, 1_000)
    assert marked.count(f"({seeds})") == 2 and marked.count("†") == 2
    assert "† fewer than 3 seeds: not a result to rely on." in written
    assert "too few seeds to say" in row(written, 1_000, "### Gap")
    assert "ahead |" not in written
    if seeds == 1:
        assert "– (one seed)" in written
    assert "Fewer than 3 seeds at some N: too few to say how sure that is" in written
    assert "clearly" not in written


def test_networks_that_lose_to_a_baseline_are_named(tmp_path):
    records = pair() + [
        baseline("logistic_regression", 100, 0.99),
        baseline("rbf_svm", 100, 0.01),
        baseline("logistic_regression", 1_000, VIT[1_000]),  # a draw is no win
        baseline("logistic_regression", 10_000, 0.2),
    ]
    written = text(records, tmp_path)
    losses = [x for x in written.splitlines() if "**loses to**" in x]
    assert len(losses) == 4
    assert (
        "ViT-mu at N = 100" in losses[0] and "logistic regression (.990)" in losses[0]
    )
    assert "RBF-SVM" not in losses[0]
    assert "ViT-mu at N = 1,000" in losses[1]
    assert "by less than the spread of the seeds" in losses[1]
    assert "ResNet-mu at N = 100" in losses[2]
    assert "ResNet-mu at N = 1,000" in losses[3]
    assert "No baseline is stored at N = 30,000: nothing is claimed there" in written
    assert row(written, 100).count("▼") == 2
    assert "▼" not in row(written, 10_000)
    assert "Every network beats" not in written
    won = text(pair() + [baseline("majority", n, 0.1) for n in SIZES], tmp_path)
    assert "Every network beats every baseline at every N that has both." in won


def test_a_capped_baseline_is_marked_and_left_out_of_the_figure(tmp_path):
    records = pair() + [
        baseline("rbf_svm", 10_000, 0.85, m_n=10_000, m_n_used=10_000),
        baseline("rbf_svm", 30_000, 0.85, m_n=30_000, m_n_used=10_000),
    ]
    drawn = {}
    written = text(records, tmp_path, drawn)
    assert "‡" in row(written, 30_000) and "‡" not in row(written, 10_000)
    assert "part of the N examples only: RBF-SVM 10,000." in written
    assert list(drawn["curve"]["series"][-1].x) == [10_000]


def test_diverged_and_failed_cells_are_listed_and_kept_out_of_the_mean(tmp_path):
    records = pair()
    lost = final("vit", 100, 7, None, status="diverged", m_diverged_at=312)
    odd = final("resnet", 1_000, 8, None)
    failed = final("hybrid", 100, 0, None, status="failed", m_error="out of memory")
    written = text([*records, lost, odd, failed], tmp_path)
    assert f"{VIT[100]:.3f}"[1:] + " ± .002 (3) §" in row(written, 100)
    assert "failed (1)" in row(written, 100)
    assert "the mean is of those that did, which flatters it" in written
    listed = written.split("### Cells that are not in the table")[1]
    assert (
        "ViT-mu, N = 100, seed 7: **diverged: loss not finite by update 312**" in listed
    )
    assert "finished without a test accuracy" in listed
    assert "**failed: out of memory**" in listed


def test_nothing_is_said_beyond_the_largest_size(tmp_path):
    vit = {n: 0.96 - 3.0 * n**-0.3 for n in (300, 1_000, 3_000, 10_000)}
    cnn = {n: 0.92 - 2.0 * n**-0.3 for n in vit}
    written = text([*curves("vit", vit), *curves("resnet", cnn)], tmp_path)
    said = "is behind at every N measured, 300 to 10,000; nothing is said of larger N."
    assert said in written and "million" not in written and "4,00" not in written
    ahead = text([*curves("vit", cnn), *curves("resnet", vit)], tmp_path)
    assert "ViT-mu is ahead at every N measured, 300 to 10,000." in ahead


def test_the_figures_of_gaps_show_the_interval_of_the_table(tmp_path):
    drawn = {}
    rng = np.random.default_rng(0)
    records = [
        final(model, 100, seed, 0.5 + 0.1 * rng.random())
        for model in ("vit", "resnet")
        for seed in range(3)
    ]
    text(records, tmp_path, drawn)
    (line,) = drawn["gap"]["series"]
    differences = [
        records[s]["metrics"]["test_accuracy"]
        - records[3 + s]["metrics"]["test_accuracy"]
        for s in range(3)
    ]
    reach = 4.3027 * np.std(differences, ddof=1) / math.sqrt(3)
    assert line.high[0] - line.y[0] == pytest.approx(reach, rel=1e-4)
    assert line.y[0] - line.low[0] == pytest.approx(reach, rel=1e-4)
    assert "Student" in drawn["gap"]["note"]


def test_a_name_has_one_style_in_all_sections(tmp_path):
    drawn = {}
    records = pair() + [baseline("logistic_regression", n, 0.9) for n in SIZES]
    records += [baseline("majority", n, 0.6, task=SCENES) for n in SIZES]
    more = {"task": SCENES, "m_receptive_field": 47}
    records += curves("resnet", CNN, **more)  # first of its section, and told apart
    records += curves("resnet", CNN, size="mu_item", **more)
    records += curves("hybrid", VIT, **more)
    text(records, tmp_path, drawn)
    assert len(drawn) == 4
    merged = {}
    for figure in drawn.values():
        for line in figure["series"]:
            style = figure["styles"][line.style]
            assert merged.setdefault(line.style, style) == style, line.style
    assert set(merged) >= {"ViT-mu", "ResNet-mu", "ResNet-mu_item", "Hybrid-mu"}
    assert len(set(map(repr, merged.values()))) == len(merged)


def test_where_no_network_beats_the_baselines_is_said_first(tmp_path):
    records = pair() + [
        baseline("rbf_svm", 100, 0.99),
        baseline("rbf_svm", 1_000, (VIT[1_000] + CNN[1_000]) / 2),
    ]
    part = text(records, tmp_path).split("## Fashion-MNIST")[1].strip()
    assert part.startswith("**At N = 100 no network beats every baseline.**")
    assert "no network beats" not in text(pair(), tmp_path)


def test_seeds_that_agree_more_than_the_test_set_allows_are_marked(tmp_path):
    records = [final("vit", 100, s, 0.8 + 0.001 * s) for s in range(3)]
    records += [final("resnet", 100, s, 0.8 + 0.02 * s) for s in range(3)]
    written = text(records, tmp_path)
    assert row(written, 100).count("◦") == 1
    assert "of the 10,000 test images, √(p(1 − p)/m) = .004." in written
    assert "◦" not in text(
        [r | {"config": r["config"] | {"task": "npz:x"}} for r in records], tmp_path
    )


def test_a_law_that_does_not_fit_gives_no_crossing(tmp_path):
    step = {100: 0.1, 300: 0.1, 1_000: 0.12, 3_000: 0.8, 10_000: 0.85, 30_000: 0.86}
    line = {n: 0.2 + 0.05 * math.log10(n) for n in step}
    written = text([*curves("vit", step), *curves("resnet", line)], tmp_path)
    assert "the law describes these points badly" in written
    assert "between N = 1,000 and 3,000" in written  # what was measured stands


def test_too_few_sizes_for_a_law_are_said(tmp_path):
    few = {n: VIT[n] for n in SIZES[:3]}
    written = text([*curves("vit", few), *curves("resnet", CNN)], tmp_path)
    assert "ViT-mu: not fitted" in written and "at least 4 different N" in written


@pytest.mark.parametrize("protocol", ["updates", "epochs"])
def test_updates_that_are_not_equal_are_not_called_equal(tmp_path, protocol):
    steps = dict(zip(SIZES, (1_000, 1_000, 1_875, 7_500), strict=True))
    records = [
        final("vit", n, s, VIT[n], updates=steps[n], protocol=protocol)
        for n in SIZES
        for s in range(3)
    ]
    written = text(records, tmp_path)
    top = written.split("## Fashion-MNIST")[1].strip().splitlines()[0]
    assert top.startswith("- **Updates are not equal**: 1,000 at N = 100; 1,000 at")
    assert "7,500 at N = 30,000" in top
    assert "grow together from N = 1,000 to 10,000, 10,000 to 30,000" in top
    assert "the power law, mixes" in top
    assert "an equal number" not in written and "epochs grow" not in written
    law = written.split("### Saturating power law")[1]
    assert "of data and length of training together" in law
    even = text(curves("vit", VIT, protocol=protocol), tmp_path)
    assert "not equal" not in even and "together" not in even


def test_networks_with_other_updates_at_one_size_are_warned_of(tmp_path):
    records = curves("vit", VIT) + curves("resnet", CNN, updates=900)
    written = text(records, tmp_path)
    assert "not all networks got the same updates" in written
    assert "500 or 900 at N = 100" in written


def test_a_model_that_changed_between_cells_is_warned_of(tmp_path):
    records = pair()
    assert "Warning" not in text(records, tmp_path)
    records[0]["metrics"]["params"] = 7
    written = text(records, tmp_path)
    assert "**Warning: `params` differs between cells of ViT-mu** (7 to 200,000)" in (
        written
    )
    assert "`flops` differs" not in written


def test_scenes_are_set_beside_the_level_without_the_relation(tmp_path):
    drawn = {}
    flat = dict.fromkeys(SIZES, 0.2)
    records = curves("vit", VIT, task=SCENES) + curves("resnet", flat, task=SCENES)
    written = text(records, tmp_path, drawn)
    assert "Reading the rim without the centre gives at most .250" in written
    assert row(written, 1_000).count("▼") == 1
    assert "(.200) **loses to** reading the rim without the centre (.250)." in written
    assert "only reading the rim without the centre is compared there" in written
    assert drawn["curve"]["level"] == (0.25, "without the centre")
    (other,) = lines.make_sections(pair(task="scenes-odd"))
    assert other.chance is None and other.span is None


def test_cells_on_different_data_are_warned_of(tmp_path):
    records = pair(m_data_sha256="1" * 64)
    assert "Warning" not in text(records, tmp_path)
    records[0]["metrics"]["data_sha256"] = "2" * 64
    assert "**Warning: not all cells saw the same data.**" in text(records, tmp_path)


# --- hyper-parameters --------------------------------------------------------------


def tuned(rates, chosen, scores, **more):
    cells = [
        final(
            "vit",
            100,
            50,
            None,
            phase="tune",
            learning_rate=rate,
            updates=100,
            validation_fraction=0.2,
            validation_maximum=15,
            m_val_accuracy=score,
            **more,
        )
        for rate, score in zip(rates, scores, strict=True)
    ]
    finals = [final("vit", 100, s, 0.5, learning_rate=chosen) for s in range(3)]
    return [*cells, *finals]


def test_the_chosen_hyper_parameters_are_shown(tmp_path):
    records = tuned([1e-4, 1e-3, 1e-2], 1e-3, [0.4, 0.6, 0.5])
    written = text(records, tmp_path)
    row = r"\| ViT-mu \| 100 \| 0\.001 +\| \.600 +\| 15 +\| 100 +\| 3 "
    assert re.search(row, written)
    assert "Tuning cells made 100 updates, final cells 500: choices after" in written
    assert "⚑" not in written and "validation prefers" not in written
    assert "chosen on a validation split" in written


def test_a_value_at_the_edge_of_the_grid_is_flagged(tmp_path):
    written = text(tuned([1e-4, 1e-3, 1e-2], 1e-2, [0.4, 0.5, 0.6]), tmp_path)
    assert "0.01 ⚑" in written and "may be undertuned" in written


def test_zero_is_no_edge(tmp_path):
    records = tuned([1e-4, 1e-3, 1e-2], 1e-3, [0.4, 0.6, 0.5], mixup=0.0)
    records += tuned([1e-3], 1e-3, [0.3], mixup=0.2)[:1]
    for made in records:
        made["config"].setdefault("mixup", 0.0)
    assert "⚑" not in text(records, tmp_path)


def test_a_choice_that_validation_does_not_back_is_shown(tmp_path):
    written = text(tuned([1e-4, 1e-3, 1e-2], 1e-3, [0.9, 0.6, 0.5]), tmp_path)
    assert "validation prefers `learning_rate=0.0001`" in written
    assert "used `learning_rate=0.001`" in written


def test_tuning_on_the_test_set_is_warned_of(tmp_path):
    records = tuned([1e-4, 1e-3], 1e-3, [0.4, 0.6])
    assert "Warning" not in text(records, tmp_path)
    records[0]["metrics"]["test_accuracy"] = 0.4
    assert "**Warning: 1 tuning cells hold test scores.**" in text(records, tmp_path)


def test_without_tuning_cells_nothing_is_claimed_to_be_tuned(tmp_path):
    written = text(pair(), tmp_path)
    assert "No tuning cells are stored: hyper-parameters were given." in written
    assert "chosen on a validation split" not in written
    assert written.count("| not tuned ") == 8
    some = text(
        [*tuned([1e-3, 3e-3], 1e-3, [0.6, 0.5]), *curves("resnet", CNN)], tmp_path
    )
    assert "- Not tuned, one given setting: ResNet-mu." in some


# --- what belongs together ---------------------------------------------------------


def test_settings_are_never_mixed_and_the_score_does_not_choose(tmp_path):
    kept = [final("vit", 100, s, 0.4) for s in range(3)]
    better = [final("vit", 100, s, 0.9, updates=900) for s in range(2)]
    written = text([*better, *kept], tmp_path)
    assert ".400 ± .000 (3)" in row(written, 100) and ".900" not in row(written, 100)
    assert "2 finished cells with other settings are stored too" in written


def test_attention_variants_are_lines_of_their_own(tmp_path):
    mine = curves("vit", CNN, attention="some/where/mine.py:fast")
    written = text([*pair(), *mine], tmp_path)
    header = next(x for x in written.splitlines() if x.startswith("| N "))
    assert header.split("|")[2].strip() == "ViT-mu"
    assert header.split("|")[3].strip() == "ViT-mu [mine.py:fast]"
    assert "some/where" not in written
    assert "### Gap: ViT-mu [mine.py:fast] − ResNet-mu" in written

    one, two = ({"attention": "m.py:f", "attention_sha256": c * 64} for c in "12")
    both = [*curves("vit", VIT, **one), *curves("vit", CNN, **two)]
    header = next(x for x in text(both, tmp_path).splitlines() if x.startswith("| N "))
    assert "[m.py:f 111111]" in header and "[m.py:f 222222]" in header


def test_each_task_and_protocol_has_a_section_and_figures(tmp_path):
    scenes = pair(task="scenes")
    epochs = pair(task="scenes", protocol="epochs")
    greys = [baseline("majority", n, 0.125, task="scenes") for n in SIZES]
    drawn = {}
    written = text([*scenes, *epochs, *greys, *pair()], tmp_path, drawn)
    names = {"curve", "gap", "curve_scenes", "gap_scenes"}
    assert set(drawn) == names | {"curve_scenes_updates", "gap_scenes_updates"}
    heads = [x for x in written.splitlines() if x.startswith("## ")]
    assert heads[:2] == ["## Where self-attention overtakes", "## Fashion-MNIST"]
    assert sorted(heads[2:4]) == [
        "## Composed scenes (protocol epochs)",
        "## Composed scenes (protocol updates)",
    ]
    # A baseline has no protocol: it stands in both.
    assert written.count("majority class |") == 2
    alone = text(scenes, tmp_path / "alone")
    assert "(curve.png)" in alone and "scenes.png" not in alone


def test_only_baselines_or_only_one_network_still_give_a_report(tmp_path):
    written = text([baseline("rbf_svm", n, 0.5) for n in SIZES], tmp_path)
    assert ".500 (1) †" in row(written, 100)
    written = text(curves("vit", VIT), tmp_path)
    assert "no gap" in written and "gap.png" not in written
    tune = tuned([1e-3], 1e-3, [0.5])[:1]
    assert "No cell of the final phase" in text(tune, tmp_path)


def test_all_cells_lost_is_a_report_too(tmp_path):
    lost = [final("vit", 100, s, None, status="diverged") for s in range(3)]
    written = text(lost, tmp_path)
    assert "diverged (3)" in row(written, 100)


def test_the_records_are_not_changed(tmp_path):
    records = pair()
    before = copy.deepcopy(records)
    text(records, tmp_path)
    assert records == before


# --- sequences ---------------------------------------------------------------------

FIELDS = {
    "cnn": dict(model="cnn", kernel=5, dilations=[1, 1, 1, 0], depth=4),
    "attention": dict(model="transformer", attention="dot_product", depth=3),
    "truncated": dict(
        model="transformer", attention="truncated", left=2, right=2, depth=3
    ),
    "gru": dict(model="gru", depth=3),
}


def spoken(name, accuracies, metric="m_test_windows_accuracy"):
    made = dict(phase="final", task="phones_64", updates=8, learning_rate=1e-3)
    made |= dict(m_params=9, m_flops=9.0) | FIELDS[name]
    return [
        record(
            **made,
            n=n,
            seed=seed,
            m_test_accuracy=0.5,
            m_test_whole_accuracy=0.4,
            **{metric: accuracy + 0.001 * seed + 0.0001 * (seed * n % 3)},
        )
        for n, accuracy in accuracies.items()
        for seed in range(3)
    ]


def test_longer_runs_at_the_largest_n_tell_their_gaps(tmp_path):
    records = [
        *spoken("cnn", {40: 0.5, 400: 0.6}),
        *spoken("attention", {40: 0.4, 400: 0.5}),
    ]
    longer = [*spoken("cnn", {400: 0.8}), *spoken("attention", {400: 0.9})]
    for one in longer:
        one["config"]["updates"] = 32
    assert "Trained for longer" not in text(records, tmp_path)
    written = text([*records, *longer], tmp_path)
    _, part = written.split("### Trained for longer, N = 400")
    (line,) = [x for x in part.splitlines() if "32 updates:" in x]
    assert line.startswith("- self-attention − CNN ±6, 32 updates: +.100 [")
    alone = [x for x in longer if x["config"]["seed"] == 0]
    written = text([*records, *alone], tmp_path)
    assert "- self-attention − CNN ±6, 32 updates: +.100 one seed" in written


def test_speech_is_judged_through_windows_and_fields_name_its_models(tmp_path):
    records = [
        *spoken("cnn", {40: 0.5, 400: 0.6}),
        *spoken("attention", {40: 0.4, 400: 0.7}),
        *spoken("truncated", {40: 0.45, 400: 0.65}),
        *spoken("gru", {40: 0.6, 400: 0.8}),
    ]
    drawn, shown = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            plots, "panels", lambda found, path, *_, **__: drawn.update(p=found)
        )
        written = text(records, tmp_path, drawn, shown)
    assert "Speech, phones of frames" in written
    assert "- self-attention against CNN ±6: overtakes between N = 40 and 400." in (
        shown["terminal"].splitlines()
    )
    assert "self-attention ±6 against CNN ±6: overtakes" in shown["terminal"]
    assert (
        "self-attention against GRU: behind at every N, up to 400" in shown["terminal"]
    )
    assert "self-attention ±6 against GRU" not in shown["terminal"]
    assert ".701" in row(written, 400), "of windows, not of crops"
    left, right = drawn["p"]
    assert {line.label for line in left.series} >= {"CNN ±6", "self-attention", "GRU"}
    assert [mark[:2] for mark in right.marks] == [(40, 400)]
    assert "crops of 0.64 s" in left.xlabel
    ways = next(x for x in written.splitlines() if x.startswith("| GRU") and "400" in x)
    assert ways.count(".500") == 1 and ways.count(".400") == 1
