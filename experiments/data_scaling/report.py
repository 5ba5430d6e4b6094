"""Tables and figures of the data-scaling experiment, from stored results alone.

`python -m experiments data_scaling --redraw FOLDER` redraws report.md, curve.png and
gap.png; further tasks get curve_<task>.png and gap_<task>.png.

Whatever weakens a number stands beside it: seeds are counted, means of fewer
than three are marked, networks that lose to a baseline are named first, runs that
diverged are listed, and nothing is said of N beyond those measured.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from experiments.core import report as tell
from experiments.core import stats
from experiments.core.report import Group, Report
from experiments.core.store import Record
from experiments.data_scaling import crossing
from experiments.data_scaling.figures import (
    MATCHED,
    MISFIT,
    draw_curve,
    draw_gap,
    gap_points,
    matched,
    styles_of,
    unmatched_pairs,
)
from experiments.data_scaling.lines import (
    ACCURACY,
    ATTENTION,
    EQUAL,
    WHOLE,
    Line,
    Section,
    created,
    is_sequences,
    make_sections,
    quotient,
)
from experiments.data_scaling.tasks import test_size
from experiments.data_scaling.tuning import hyper_parameters, untuned

PROTOCOLS = {
    "updates": "an equal number of optimiser updates for every N",
    "epochs": "epochs grow as N shrinks (epochs × 1/f)",
}
_PIECE = "test_whole_accuracy"
_WITHOUT_CENTRE = "reading the rim without the centre"

_number = functools.partial(tell.decimal, digits=3)
_signed = functools.partial(tell.decimal, digits=3, sign=True)
_table = functools.partial(tell.table, aligned=True)

# --- what a section says first -----------------------------------------------------


def _at(sizes: Iterable[int]) -> str:
    return ", ".join(f"{n:,}" for n in sizes)


def _none_ahead(section: Section) -> list[str]:
    """Say first at which N no network beats every baseline."""
    worse = []
    for n in section.sizes:
        means = [line.means[n] for line in section.networks if n in line.means]
        if means and all(_lost_to(section, n, found) for found in means):
            worse.append(f"{n:,}")
    said = f"**At N = {' and '.join(worse)} no network beats every baseline.**"
    return [said] if worse else []


def _protocol(section: Section) -> list[str]:
    keys, configs = section.keys, section.configs
    text = _uneven_updates(section)
    if "protocol" in keys:
        meaning = None if section.uneven else PROTOCOLS.get(str(keys["protocol"]))
        text.append(f"Protocol `{keys['protocol']}`" + f": {meaning}" * bool(meaning))
    if section.updates:
        if not section.uneven:  # else they stand above
            text.append(f"Optimiser updates: {_updates_said(section.updates)}")
        batches = {int(c["batch_size"]) for c in configs if c.get("batch_size")}
        if len(batches) == 1:
            batch = batches.pop()
            epochs = {n: max(u) * batch / n for n, u in section.updates.items()}
            said = ", ".join(
                f"{tell.count(e) if e >= 10 else f'{e:.2g}'} at N = {n:,}"
                for n, e in epochs.items()
            )
            text.append(f"Batch {batch}; that makes epochs of {said}")
    hashes = {str(h)[:16] for x in section.lines for h in x.metric("data_sha256")}
    if hashes:
        warning = ". **Warning: not all cells saw the same data.**"
        said = f"Data: sha256 {', '.join(sorted(hashes))}"
        text.append(said + warning * (len(hashes) > 1))
    for line in section.networks:
        for name in ("params", "flops"):
            values = line.metric(name, tune=True)
            if len(set(values)) > 1:
                text.append(
                    f"**Warning: `{name}` differs between cells of {line.label}** "
                    f"({tell.span(values)}): the definition of the model changed, so "
                    "that they are not one line"
                )
    seeds = {s for x in section.networks for found in x.scores.values() for s in found}
    if seeds:
        text.append(f"Seeds: {', '.join(map(str, sorted(seeds)))}")
    tuned = [record for line in section.networks for record in line.tune]
    if tuned:
        chosen = (
            "the validation part of the task, whole at every N"
            if is_sequences(section.task)
            else "a validation split cut from the training subset"
        )
        text.append(
            f"Hyper-parameters were chosen on {chosen}; the test set was read once per "
            "final cell"
        )
        given = [x.label for x in section.networks if untuned(x)]
        if given:
            text.append(f"Not tuned, one given setting: {', '.join(given)}")
        leaks = sum(
            any(
                k.startswith("test_") and v is not None for k, v in r["metrics"].items()
            )
            for r in tuned
        )
        if leaks:
            text.append(f"**Warning: {leaks} tuning cells hold test scores.**")
    elif configs:
        text.append("No tuning cells are stored: hyper-parameters were given")
    hidden = "seed n model size phase updates protocol task attention attention_sha256"
    hidden += " differs position_options"
    shared = {
        key: value
        for key, value in sorted(configs[0].items() if configs else ())
        if key not in hidden.split()
        and value is not None
        and all(key in c and c[key] == value for c in configs)
    }
    if shared:
        text.append(f"The same in all final cells: {tell.assignments(shared)}")
    return ["\n".join(f"- {_sentence(line)}" for line in text)] if text else []


def _sentence(text: str) -> str:
    return text if text.endswith((".", "**")) else f"{text}."


def _updates_said(updates: Mapping[int, Sequence[int]]) -> str:
    if len({u for found in updates.values() for u in found}) == 1:
        return f"{min(next(iter(updates.values()))):,} at every N"
    return "; ".join(
        f"{' or '.join(map(tell.count, found))} at N = {n:,}"
        for n, found in updates.items()
    )


def _uneven_updates(section: Section) -> list[str]:
    """Say at the top where the number of updates is not the same for every cell."""
    if not section.uneven:
        return []
    updates = section.updates
    text = [f"**Updates are not equal**: {_updates_said(updates)}."]
    ends = {n: (min(found), max(found)) for n, found in updates.items()}
    steps = [
        (one, two)
        for one, two in zip(ends, list(ends)[1:], strict=False)
        if ends[two][1] > EQUAL * ends[one][0] or ends[one][1] > EQUAL * ends[two][0]
    ]
    if steps:
        said = ", ".join(f"{one:,} to {two:,}" for one, two in steps)
        grows = all(ends[two][0] >= ends[one][1] for one, two in steps)
        text[0] += (
            " (A cap on the passes over small sets gives that.) Data and updates grow "
            "together"
            if grows
            else " Data and updates change together"
        ) + (
            f" from N = {said}: what is gained there, and with it the power law, "
            "mixes the effect of more data with that of longer training."
        )
    within = [n for n, (low, high) in ends.items() if high > EQUAL * low]
    if within:
        text.append(
            f"**Warning: at N = {_at(within)} not all networks got the same "
            "updates**, so that the gap there mixes in the length of training."
        )
    return text


# --- accuracies --------------------------------------------------------------------


def _accuracy_table(section: Section, *, bold: bool = True) -> str:
    lines = [x for x in section.lines if x.points]
    rows = []
    for n in section.sizes or sorted({n for x in lines for n in x.points}):
        best = max(
            (x.means[n].mean for x in section.networks if n in x.means), default=0
        )
        row = [f"{n:,}"]
        for line in lines:
            if n not in line.points:
                row.append(tell.NONE)
            elif n not in line.means:
                kinds = tell.grouped(line.points[n].lost, lambda r: r["status"])
                known = {k.replace("done", "no score"): len(kinds[k]) for k in kinds}
                row.append(", ".join(f"{k} ({v})" for k, v in sorted(known.items())))
            else:
                entry = tell.mean(line.means[n], 3, count=True)
                if bold and line in section.networks and line.means[n].mean == best:
                    entry = f"**{entry}**"
                row.append(" ".join([entry, *_marks(section, line, n)]))
        rows.append(row)
    return _table(["N", *(x.label for x in lines)], rows)


def _marks(section: Section, line: Line, n: int) -> list[str]:
    marks = {
        "†": not line.means[n].enough,
        "‡": line.capped(n),
        "§": line.points[n].lost,
        "▼": line in section.networks and _lost_to(section, n, line.means[n]),
        "◦": _few_test_images(section, line, n),
    }
    return [mark for mark, holds in marks.items() if holds]


def _few_test_images(section: Section, line: Line, n: int) -> float | None:
    """The sampling error of the test set, where seeds differ by less than that."""
    size, found = test_size(section.task), line.means[n]
    if size is None or found.std is None or line.model == "majority":
        return None
    error = stats.sampling_error(found.mean, size)
    return error if found.std < error else None


def _accuracy(section: Section) -> Iterator[str]:
    places = [(line, n) for line in section.lines for n in line.means]
    capped = sorted({f"{x.label} {c:,}" for x, n in places if (c := x.capped(n))})
    errors = [e for place in places if (e := _few_test_images(section, *place))]
    notes = {
        "†": "fewer than 3 seeds: not a result to rely on.",
        "‡": f"fitted to a part of the N examples only: {', '.join(capped)}.",
        "§": "not all seeds finished (see below); the mean is of those that did, "
        "which flatters it.",
        "▼": "does not beat every baseline at that N.",
        "◦": "seeds differ by less than the sampling error of the "
        f"{tell.count(test_size(section.task))} test images, √(p(1 − p)/m) = "
        f"{tell.span(errors, _number)}.",
    }
    used = {mark for place in places for mark in _marks(section, *place)}
    legend = [f"{mark} {note}  " for mark, note in notes.items() if mark in used]
    if any(line.means for line in section.networks):
        legend.append("Bold: the best network at that N, by its mean alone.")
    written = _accuracy_table(section)
    if tell.NONE in written:
        legend.append(f"{tell.NONE}: no result stored.")
    yield from ("### Test accuracy", written, "\n".join(legend))
    yield from _ways(section)
    if section.chance is not None:
        yield (
            f"{_WITHOUT_CENTRE.capitalize()} gives at most {_number(section.chance)}: "
            "a network that does not exceed it has not shown that it relates the two."
        )


def _ways(section: Section) -> Iterator[str]:
    """Of speech, the other ways of scoring, beside windows over whole utterances."""
    if any(line.metric_name != WHOLE for line in section.networks):
        return
    yield (
        "Above: whole utterances, labelled through overlapping windows as long as the "
        "training crops, each frame where it is most central. Beside it, on separate "
        f"{section.examples}, and on whole utterances in one piece, a length that "
        "training had not:"
    )
    rows = [
        [line.label, f"{n:,}"]
        + [tell.mean(line.points[n].of(m), 3) for m in (ACCURACY, _PIECE, WHOLE)]
        for line in section.networks
        for n in dict.fromkeys((min(line.means), max(line.means)))
    ]
    yield _table(["model", "N", "crops", "in one piece", "windows"], rows)


def _lost_to(
    section: Section, n: int, found: stats.Summary
) -> dict[str, stats.Summary]:
    """The baselines at this N that a mean does not exceed."""
    rivals = {x.label: x.means[n] for x in section.baselines if n in x.means}
    if section.chance is not None:
        rivals[_WITHOUT_CENTRE] = stats.Summary(1, section.chance, None)
    return {name: rival for name, rival in rivals.items() if found.mean <= rival.mean}


def _losers(section: Section) -> list[str]:
    known = {n for line in section.baselines for n in line.means}
    text = []
    for line in section.networks:
        for n, found in line.means.items():
            if lost := _lost_to(section, n, found):
                names = " and ".join(
                    f"{k} ({_number(r.mean)})" for k, r in lost.items()
                )
                close = all(
                    abs(found.mean - r.mean) < math.hypot(found.std or 0, r.std or 0)
                    for r in lost.values()
                )
                text.append(
                    f"- {line.label} at N = {n:,} ({_number(found.mean)}) **loses to** "
                    + names
                    + ", by less than the spread of the seeds" * close
                    + "."
                )
    sizes = {n for line in section.networks for n in line.means}
    if not text and (sizes & known or (sizes and section.chance is not None)):
        text.append("Every network beats every baseline at every N that has both.")
    if missing := sorted(sizes - known):
        claim = (
            "nothing is claimed there."
            if section.chance is None
            else f"only {_WITHOUT_CENTRE} is compared there."
        )
        text.append(f"- No baseline is stored at N = {_at(missing)}: {claim}")
    return ["### Beside the baselines", "\n".join(text)] if text else []


# --- gaps, laws, crossings ---------------------------------------------------------


def _gaps(section: Section) -> list[str]:
    text: list[str] = []
    for first, second in section.pairs:
        found = gap_points(first, second)
        if not found:
            continue
        difference = f"{first.label} − {second.label}"
        text.append(f"### Gap: {difference}")
        ratio = quotient(first, second)
        if ratio is not None and not matched(ratio):
            text.append(f"FLOPs are **not matched**: × {ratio:.2f}.")
        text += _reach(section, second)
        rows = [
            [
                f"{n:,}",
                _signed(gap.mean),
                tell.interval(gap, 3) or f"{tell.NONE} (one seed)",
                " and ".join(map(str, dict.fromkeys(gap.seeds))),
                _reading(gap, first, second),
            ]
            for n, gap in found.items()
        ]
        text.append(
            _table(["N", difference, "95 % interval", "seeds", "reading"], rows)
        )
        paired = all(gap.paired for gap in found.values())
        how = "paired by seed" if paired else "paired where the seeds are the same"
        text.append(f"Student's intervals over seeds ({how}), on one fixed test set.")
    if not text and section.networks:
        text = ["No N has both a network with attention and a CNN: no gap."]
    return text


def _reach(section: Section, cnn: Line) -> list[str]:
    """Set the receptive field of a CNN beside what a relation of scenes spans."""
    fields = cnn.metric("receptive_field")
    if section.span is None or not fields:
        return []
    verdict = (
        "covers it."
        if min(fields) >= section.span
        else "is narrower: no convolution of it sees both items whole."
    )
    if cnn.passes_on and min(fields) < section.span:
        verdict += (
            " But group normalisation shares two numbers a group over the whole image, "
            "layer by layer, so a position learns something of all others."
        )
    return [
        f"A relation spans {section.span} pixels; the receptive field of {cnn.label} "
        f"is {tell.span(fields, str)} pixels, which {verdict}"
    ]


def _reading(gap: stats.Gap, first: Line, second: Line) -> str:
    leader = first.label if gap.mean > 0 else second.label
    if not gap.enough:
        return "too few seeds to say"
    return f"{leader} ahead" if gap.clear else "no difference shown"


def _laws(section: Section) -> list[str]:
    rows, remarks = [], []
    for line in section.networks:
        if not line.means:
            continue
        try:
            law = stats.fit_power_law(line.scores)
        except stats.FitError as error:
            remarks.append(f"- {line.label}: not fitted, {error}.")
            continue
        notes = ["the law describes these points badly"] * (law.worst > MISFIT)
        if law.at_bound:
            notes.append(f"{', '.join(law.at_bound)} held by its bound")
        sizes = f"{law.n_min:,} to {law.n_max:,} ({law.sizes})"
        numbers = _number(law.a), f"{law.b:.3g}", f"{law.c:.3g}"
        said = "; ".join(notes) or tell.NONE
        rows.append([line.label, *numbers, sizes, _number(law.worst), said])
    if not rows and not remarks:
        return []
    text = ["### Saturating power law, and where the curves cross"]
    if section.uneven:
        text.append(
            "Updates differ between the N (see the top): the laws below are of data "
            "and length of training together, not of data alone."
        )
    if rows:
        header = ["model", "a", "b", "c", "N (sizes)", "largest miss", "remark"]
        text.append("acc(N) = a − b·N^(−c), least squares on the means:")
        text.append(_table(header, rows))
    crossings = [f"- {crossing_statement(*pair)}" for pair in section.pairs]
    return text + ["\n".join(lines) for lines in (remarks, crossings) if lines]


def crossing_statement(first: Line, second: Line) -> str:
    """Say in words between which measured N one model overtakes the other."""
    name = f"**{first.label} and {second.label}.**"
    common = sorted(set(first.means) & set(second.means))
    if not common:
        return f"{name} They share no N."
    measured = f"at every N measured, {common[0]:,} to {common[-1]:,}"
    ahead = [n for n in common if first.means[n].mean > second.means[n].mean]
    if not ahead:
        said = f"is behind {measured}; nothing is said of larger N."
    elif len(ahead) == len(common):
        said = f"is ahead {measured}."
    elif (found := stats.overtaking(first.scores, second.scores)) is None:
        said = (
            f"is ahead at N = {_at(ahead)} and behind at the largest, {common[-1]:,}."
        )
    else:
        return (
            f"{name} The mean of {first.label} gets ahead, and stays ahead, between N "
            f"= {found.after:,} and {found.until:,}. {_certainty(first, second, found)}"
        )
    return f"{name} {first.label} {said}"


def _certainty(first: Line, second: Line, found: stats.Overtaking) -> str:
    """Say between which N the overtaking clearly lies, given the seeds behind it."""
    if not all(x.enough for x in (*first.means.values(), *second.means.values())):
        return "Fewer than 3 seeds at some N: too few to say how sure that is."
    behind = (
        f"clearly behind at {found.behind:,}"
        if found.behind is not None
        else "at no N clearly behind"
    )
    ahead = (
        f"clearly ahead from {found.ahead:,} on"
        if found.ahead is not None
        else "not clearly ahead at the largest N"
    )
    return f"By the differences between seeds (Student, 95 %) it is {behind}, {ahead}."


def _sizes(section: Section) -> list[str]:
    known = [x for x in section.networks if x.metric("params") or x.metric("flops")]
    if not known:
        return []
    fields = any(line.metric("receptive_field") for line in known)
    columns: dict[str, Callable[[Line], str]] = {
        "model": lambda x: x.label,
        "parameters": lambda x: tell.span(x.metric("params")),
        f"forward MFLOP / {section.item}": lambda x: tell.span(
            x.metric("flops"), lambda v: f"{v / 1e6:,.3g}"
        ),
    }
    if fields:
        columns["receptive field (pixels)"] = lambda x: (
            "whole image"
            if not x.metric("receptive_field") and x.model in (*ATTENTION, "mlp")
            else tell.span(x.metric("receptive_field"), str)
        )
        if section.span is not None:
            columns["relation spans (pixels)"] = lambda x: str(section.span)
    if any(line.metric("images_per_s") for line in known):
        columns["training images / s"] = lambda x: tell.span(x.metric("images_per_s"))
    columns["minutes / final cell"] = lambda x: tell.span(
        (r["wall_time_s"] / 60 for r in x.finals), lambda v: f"{v:.1f}"
    )
    text = ["### Sizes"]
    text.append(
        _table(list(columns), [[f(x) for f in columns.values()] for x in known])
    )
    if unmatched := unmatched_pairs(section.pairs):
        text.append(
            f"FLOPs are **not matched** (ratio outside {MATCHED}) for "
            f"{', '.join(unmatched)}: such a gap is one of compute too."
        )
    lines = []
    for pair in section.pairs:
        ratio, params = quotient(*pair), quotient(*pair, "params")
        if ratio is not None:
            verdict = "matched" if matched(ratio) else "**not matched**"
            lines.append(
                f"- {pair[0].label} / {pair[1].label}: forward FLOPs × {ratio:.2f} "
                f"({verdict}; within × {MATCHED} counts)"
                + (f", parameters × {params:.2f}." if params is not None else ".")
            )
    lines.append(
        f"- FLOPs are those of one {section.item}'s forward pass as "
        "`attn_jax.tools.cost` counts them now, whatever a record holds. Rates and "
        "minutes are what the machines at hand gave, other work included."
    )
    return [*text, "\n".join(lines)]


def _longer(section: Section) -> list[str]:
    """Whether a longer run at the largest N ordered the networks otherwise."""
    found: dict[str, dict[int, str]] = {}
    scores: dict[int, dict[str, Mapping[int, float]]] = collections.defaultdict(dict)
    for line in section.networks:
        n = max(line.means, default=0)
        rows = [line.points[n], *line.other[n]] if n else []
        # Longer runs are of one setting: the rate that was chosen.
        for row in rows:
            updates = row.config.get("updates")
            if (score := row.of(line.metric_name)) is not None and updates:
                told = tell.mean(score, 3, count=True)
                found.setdefault(line.label, {})[int(updates)] = told
                scores[int(updates)][line.label] = row.scores(line.metric_name)
    if len(scores) < 2:
        return []
    lines = []
    for updates, of in sorted(scores.items())[1:]:
        for one, two in ((a.label, b.label) for a, b in section.pairs):
            if one in of and two in of and of[one].keys() & of[two].keys():
                seeds = sorted(of[one].keys() & of[two].keys())
                gap = stats.gap(*({s: of[x][s] for s in seeds} for x in (one, two)))
                mean = tell.decimal(gap.mean, 3, sign=True)
                sure = "one seed" if gap.low is None else tell.interval(gap, 3)
                lines.append(f"- {one} − {two}, {updates:,} updates: {mean} {sure}")
    largest = max(section.sizes)
    return [
        f"### Trained for longer, N = {largest:,}",
        tell.pivot("model", found, "{:,} updates"),
        "\n".join(lines),
    ]


# --- the rest ----------------------------------------------------------------------


def _training_accuracy(section: Section) -> list[str]:
    lines = [x for x in section.networks if x.metric("train_accuracy")]

    def entry(line: Line, n: int) -> str:
        found = line.points[n].of("train_accuracy") if n in line.means else None
        return tell.mean(found, 3, count=True)

    rows = [[f"{n:,}", *(entry(line, n) for line in lines)] for n in section.sizes]
    header = ["N", *(x.label for x in lines)]
    return ["### Training accuracy", _table(header, rows)] if lines else []


def _lost(section: Section) -> list[str]:
    text: list[str] = []
    for line in section.lines:
        for n, point in line.points.items():
            for record in point.lost:
                seed = record["config"].get("seed")
                text.append(
                    f"- {line.label}, N = {n:,}, seed {seed}: {_outcome(record)}"
                )
            if others := [r for row in line.other[n] for r in row.records]:
                text.append(
                    f"- {line.label}, N = {n:,}: {len(others)} finished cells "
                    "with other settings are stored too; the table takes the setting "
                    "with most seeds, then the latest, without a look at the scores."
                )
        for record in line.tune:
            if record["status"] != "done":
                n = record["config"].get("n")
                text.append(f"- {line.label}, N = {n:,}, tuning: {_outcome(record)}")
    return ["### Cells that are not in the table", "\n".join(text)] if text else []


def _outcome(record: Record) -> str:
    config, metrics = record["config"], record["metrics"]
    reason = metrics.get("reason") or metrics.get("error")
    if metrics.get("diverged_at") is not None:
        reason = f"loss not finite by update {metrics['diverged_at']:,}"
    said = record["status"] + (f": {reason}" if reason else "")
    if record["status"] == "done":
        said = "finished without a test accuracy"
    names = ("learning_rate", "weight_decay", "updates")
    shown = {k: config[k] for k in names if config.get(k) is not None}
    return f"**{said}** ({tell.assignments(shown) or 'no settings stored'})."


def _provenance(records: Sequence[Record]) -> list[str]:
    made = [record["provenance"] for record in records]

    def cells(name: str) -> str:
        found = collections.Counter(str(p.get(name) or "unknown") for p in made)
        return ", ".join(f"{value} ({k} cells)" for value, k in sorted(found.items()))

    phases = collections.Counter(
        (str(r["config"].get("phase")), r["status"]) for r in records
    )
    versions = collections.Counter(
        ", ".join(f"{k} {v}" for k, v in sorted(p["versions"].items()))
        for p in made
        if p.get("versions")
    )
    said = ", ".join(f"{k} {p} {s}" for (p, s), k in sorted(phases.items()))
    hours = sum(r["wall_time_s"] for r in records) / 3600
    dirty = sum(bool(p.get("git_dirty")) for p in made)
    text = [
        f"- Cells: {said}; {hours:.2f} hours in sum.",
        f"- Commit: {cells('git_commit')}."
        + f" The code had uncommitted changes in {dirty} cells." * bool(dirty),
        f"- Device: {cells('device')}; Python {cells('python')}.",
        *(f"- Versions ({k} cells): {v}." for v, k in sorted(versions.items())),
    ]
    if times := sorted(filter(None, map(created, records))):
        text.append(f"- Made between {times[0]} and {times[-1]}.")
    return ["## Where the numbers come from", "\n".join(text)]


# --- the report --------------------------------------------------------------------

_BEFORE_FIGURES = (_none_ahead, _protocol, _accuracy)
_AFTER_FIGURES = (
    _losers,
    _gaps,
    _laws,
    _longer,
    _sizes,
    hyper_parameters,
    _training_accuracy,
    _lost,
)


def _sections(group: Group) -> Iterator[str]:
    """All sections with their figures."""
    sections = make_sections(group.records)
    styles = styles_of(sections)
    if any(section.pairs for section in sections):
        yield "## Where self-attention overtakes"
        yield from crossing.draw(sections, styles, group)
        yield from crossing.overview(sections)
    for section in sections:
        yield f"## {section.title}"
        for part in _BEFORE_FIGURES:
            yield from part(section)
        if section is not crossing.of_fields(sections):
            for draw in (draw_curve, draw_gap):
                yield from draw(section, styles, group)
        for part in _AFTER_FIGURES:
            yield from part(section)
    if not sections:
        yield "No cell of the final phase has been started: nothing to compare."


def _summary(group: Group) -> Iterator[str]:
    """The accuracy tables alone, as aligned text for a terminal."""
    for section in make_sections(group.records):
        yield from [x.replace("**", "") for x in _none_ahead(section)]
        yield f"{section.title}: test accuracy, N counts {section.examples}"
        yield _accuracy_table(section, bold=False)
        yield "\n".join(crossing.statements(section))
        _, *lines = _losers(section) or [""]
        yield from [x.replace("**", "") for x in lines if x.startswith("- ")]


REPORT = Report(
    title="# Accuracy as the training set grows",
    least=0,
    text=(
        "Written by `python -m experiments data_scaling --redraw` from "
        "`results.jsonl`; do not edit.",
        "Numbers are accuracies on the fixed test set: mean ± standard deviation over "
        "seeds (number of seeds). A seed draws the training subset, the initial "
        "weights and the order of the examples.",
        _sections,
        lambda group: _provenance(group.records),
    ),
    terminal=_summary,
)
