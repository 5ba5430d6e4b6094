"""Writes the pages that Sphinx reads: `python docs/_ext/site_pages.py FOLDER EXTRA`.

Hand-written are `index.md`, `lecture.md` and `tutorials/`; all others are made here
from the code, its docstrings, the zoo and the stored records. FOLDER gets the pages,
EXTRA what is copied into the site as it is. A file that stays the same is left alone,
so that Sphinx reads again only what has changed.
"""

from __future__ import annotations

import html
import inspect
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import site_api
import site_figures
import site_numbers
import site_run
from site_lecture import lecture
from site_numbers import ROOT, arena, folders, records, rows, slug, stored

from attn_jax import CAPABILITIES, VARIANTS, Variant
from experiments.core import report, run
from experiments.core.store import Record

HERE = ROOT / "docs"
Pages = Iterator[tuple[str, str]]

# ----------------------------------------------------------------------- results

# What a record is judged by, the first that it has.
SCORES = (
    "test_windows_accuracy",
    "test_whole_accuracy",
    "test_accuracy",
    "test_rmse",
    "test_bits",
    "test_loss",
)


def score_of(row: report.Row) -> tuple[str, str] | None:
    """The metric that a setting is judged by, and its mean ± deviation."""
    for metric in SCORES:
        found = row.of(metric)
        if found is not None:
            return metric, report.mean(found)
    return None


def told(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some settings in words."""
    return ", ".join(f"{k} {report.plain(settings[k])}" for k in names if k in settings)


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which some differ, less those that have a column of their own."""
    names = dict.fromkeys(name for config in configs for name in config)
    own = {"task", "model", "seed", "phase", "learning_rate", "differs"}
    return [
        name
        for name in names
        if name not in own and len({repr(c.get(name)) for c in configs}) > 1
    ]


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics that are numbers or short texts."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float, str, type(None))) and len(str(value)) < 80
    }


def _record_row(record: Record, names: Sequence[str]) -> str:
    """A record as a row of HTML."""
    config, metrics = record["config"], record["metrics"]
    made = record["provenance"]
    score = next((m for m in SCORES if metrics.get(m) is not None), None)
    everything = {
        "config": config,
        "metrics": _scalars(metrics),
        "provenance": made,
    }
    shown = html.escape(json.dumps(everything, indent=1, ensure_ascii=False))
    cells = (
        config["phase"],
        config["task"],
        config["model"],
        config.get("seed", ""),
        told(config, names),
        f"{score}: {metrics[score]:.4f}" if score else "",
        record["status"],
        f"{record['wall_time_s'] / 60:.1f}",
        made["git_commit"][:10] + ("+" if made["git_dirty"] else ""),
        made["created_utc"][:10],
    )
    tds = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
    return (
        f'<tr id="{record["hash"]}"><td><details><summary>{record["hash"]}</summary>'
        f"<pre>{shown}</pre></details></td>{tds}</tr>"
    )


def _records_page(name: str) -> str:
    """All records of a folder in one table."""
    found = records(name)
    order = sorted(
        found, key=lambda r: (r["config"]["phase"], report.settings_of(r), r["hash"])
    )
    names = varying([record["config"] for record in found])
    head = "record,phase,task,model,seed,settings,score,status,minutes,commit,date"
    ths = "".join(f"<th>{title}</th>" for title in head.split(","))
    body = "\n".join(_record_row(record, names) for record in order)
    return f"""---
nosearch: true
---

# Records: {name}

{len(found)} cells, one a row: open one for its settings, scores and versions. The
<a href="../_records/{slug(name)}-results.jsonl">file itself</a> has the curves too. A
hash names the settings; a commit with + had changes besides. {{doc}}`The report
<{slug(name)}>` says what they show.

```{{raw}} html
<table class="records"><thead><tr>{ths}</tr></thead><tbody>
{body}
</tbody></table>
```
"""


def commands(experiment: run.Experiment) -> list[tuple[str, str]]:
    """Presets and about how long they take."""
    return [(name, experiment.minutes.get(name, "")) for name in experiment.presets]


def results(kept: pathlib.Path | None = None) -> Pages:
    """Reports, their records, an index by experiment; figures as SVG where kept."""
    parts = [
        """# Results

Every report is written by a program from stored records, and says how it was measured;
`make figures` writes them all anew. {doc}`../claims` sets what they show beside what
was claimed, {doc}`../limits` says what they do not show.
"""
    ]
    for name in run.names():
        found = run.find(name)
        known = [key for key in folders() if key.split("/")[0] == name]
        first, _, rest = found.about.partition("\n")
        lines = [f"## {name}", first]
        lines += [f"* {{doc}}`{key} <{slug(key)}>`" for key in known]
        if not known:
            lines.append("Built and tested; not run at its full size.")
        table = report.table(
            ["command", "takes"],
            [
                [f"`python -m {found.module} --preset {preset}`", minutes or "–"]
                for preset, minutes in commands(found)
            ],
        )
        parts.append("\n\n".join([*lines, table]))
    pages = [s for key in folders() for s in (slug(key), f"{slug(key)}-records")]
    toc = "\n".join(pages)
    parts.append(f"```{{toctree}}\n:hidden:\n\n{toc}\n```\n")
    yield "results/index.md", "\n\n".join(parts)
    for key, folder in folders().items():
        name = key.split("/")[0]
        text = (folder / "report.md").read_text("utf-8")
        title, _, rest = text.partition("\n")
        figures = site_figures.drawn(key, folder, kept) if kept else {}
        rest = site_figures.placed(rest, figures)
        image = r"(!\[[^\]]*\]\()(?=[^)/]+\.(?:png|gif|svg)\))"
        rest = re.sub(image, rf"\1{slug(key)}/", rest)
        head = (
            f"Experiment `{name}`. {len(records(key))} "
            f"{{doc}}`records <{slug(key)}-records>` with settings, commit and "
            "versions. Written by `python -m experiments --redraw`."
        )
        yield f"results/{slug(key)}.md", f"{title}\n\n{head}\n{rest}"
        yield f"results/{slug(key)}-records.md", _records_page(key)


def maps() -> dict[str, list[Any]]:
    """Stored weights of attention by folder: title, ticks, weights [L][N][T][T]."""
    found = {}
    for key, folder in folders().items():
        if (folder / "maps.json").is_file():
            found[key] = stored(key, "maps.json")["maps"]
    return found


def explorer() -> Pages:
    """Who attends to whom, to be looked at."""
    data = [
        {"name": f"{key}: {entry['title']}", **entry}
        for key, entries in maps().items()
        for entry in entries
    ]
    inside = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    yield (
        "explorer.md",
        f"""---
nosearch: true
---

# Who attends to whom

Weights of trained models, as stored with their results. Point at a token, or go to it
with the tab key: each row shows what a head of a layer gives to every token when that
one asks. Strong colour is much; a cell says its weight when pointed at.

```{{raw}} html
<div id="explorer"></div>
<script type="application/json" id="explorer-data">{inside}</script>
```
""",
    )


def _copies() -> Iterator[tuple[str, pathlib.Path]]:
    """What reports show, by its place among the pages."""
    for key, folder in folders().items():
        for path in sorted(folder.glob("*")):
            if path.suffix in (".png", ".gif", ".svg"):
                yield f"results/{slug(key)}/{path.name}", path


def _extras() -> Iterator[tuple[str, pathlib.Path]]:
    """What the site gives as files."""
    for key, folder in folders().items():
        for path in [*folder.glob("*.json"), folder / "results.jsonl"]:
            yield f"_records/{slug(key)}-{path.name}", path
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        yield f"_records/benchmarks-{path.name}", path


# ---------------------------------------------------------------------- variants


def variant_of(config: Mapping[str, Any]) -> str | None:
    """The variant that a cell's attention is; None where it has none of the zoo's."""
    model = config.get("model", "")
    named = config.get("attention") or config.get("score")
    if named is None:
        named = {
            "vit": "dot_product",
            "hybrid": "dot_product",
            "transformer": "dot_product",
            "softmax": "dot_product",
        }.get(model, model)
    if named == "dot_product" and config.get("left") is not None:
        named = "truncated"
    return named if named in VARIANTS else None


def _trained(name: str) -> str:
    """A variant's scores in every experiment, each linked to its records."""
    lines = []
    for key in folders():
        mine = [row for row in rows(key) if variant_of(row.config) == name]
        names = varying([row.config for row in mine])
        for row in mine:
            if (found := score_of(row)) is None:
                continue
            metric, text = found
            link = f"{slug(key)}-records.html#{row.records[0]['hash']}"
            number = f'<a class="number" href="../results/{link}">{text}</a>'
            lines.append(
                [
                    f"{{doc}}`{key} <../results/{slug(key)}>`",
                    row.config["task"],
                    row.config["model"],
                    told(row.config, names),
                    f"`{metric}`",
                    number,
                ]
            )
    if not lines:
        return (
            "No experiment has trained it yet. "
            f"`python -m experiments.data_scaling --attention {name}` does, on speech."
        )
    header = ["experiment", "task", "model", "settings", "score", "mean ± deviation"]
    return report.table(header, lines)


def _cost(name: str) -> str:
    """A variant's training step in the benchmark, by length."""
    lines = []
    for table in stored("benchmarks", "long_range.json")["long_range"]:
        row = arena(name, table["short"])
        if row is None:
            continue
        mid, low, high = row["against"]["dot_product"]
        exact = row["against"].get("blockwise", [float("nan")])[0]
        lines.append(
            [
                f"{table['length']:,}",
                f"{row['milliseconds']:,.1f}",
                f"{mid:.3g} [{low:.3g}, {high:.3g}]",
                f"{exact:.3g}",
                report.decimal(row["memory_share"], 3),
            ]
        )
    header = [
        "tokens",
        "ms a step",
        "times dense",
        "times blockwise",
        "memory of dense",
    ]
    if not lines:
        return "Not in the benchmark."
    about = (
        "A training step of a small encoder on two CPU cores, options as they are by "
        "default; above 1 is faster; "
        "memory as a share of dense. <a "
        'href="../_records/benchmarks-long_range.json">All figures</a>, '
        "`python -m benchmarks.long_range`."
    )
    grown = [
        f"{row['direction']}: time as T^{row['time']:.2f}, FLOPs T^{row['flops']:.2f}, "
        f"temporary memory T^{row['temp']:.2f}, up to T = {row['longest']:,}"
        for row in stored("benchmarks", "growth.json")["growth"]
        if row["name"] == name and row["time"] is not None
    ]
    more = f"\n\nGrowth as measured: {'; '.join(grown)}." if grown else ""
    return f"{report.table(header, lines)}\n\n{about}{more}"


def _advice(name: str, variant: Variant) -> list[str]:
    """What the figures say on whether to take a variant."""
    said = []
    if variant.exact:
        said.append("It is exact: the numbers of softmax attention, to rounding.")
    elif variant.approximates is not None:
        to = getattr(variant.approximates, "__name__", "")
        knob = ", ".join(dict.fromkeys(k for step in variant.knob for k in step))
        said.append(
            f"It comes near to `{to}`; `attn-jax check {name}` measures how near, and "
            f"that the error falls along `{knob}`."
        )
    else:
        said.append("It is a function of its own and stands in for no other one.")
    row, exact = arena(name), arena("blockwise")
    if row and exact and name != "dot_product":
        mine, blocks = (
            row["against"]["dot_product"][0],
            exact["against"]["dot_product"][0],
        )
        said.append(
            f"At 4,096 tokens a training step is {mine:.3g} times as fast as dense "
            f"attention, in {report.decimal(row['memory_share'], 3)} of its memory."
        )
        if name != "blockwise":
            than = (
                "so exact attention is faster: take this one for what it computes, not "
                "for speed"
                if mine < blocks
                else "so it saves time too where its function is good enough"
            )
            said.append(
                f"Exact attention block by block ({{doc}}`blockwise`) has {blocks:.3g} "
                f"times and {report.decimal(exact['memory_share'], 3)}, {than}."
            )
    elif row is None:
        every = stored("benchmarks", "long_range.json")["long_range"]
        told = {r["name"]: r.get("skipped") for table in every for r in table["rows"]}
        why = told.get(name) or "it is not in the benchmark"
        said.append(f"Its speed at 4,096 tokens is not known here: {why}.")
    missing = [c for c in CAPABILITIES if not getattr(variant, c)]
    if missing:
        said.append(f"It refuses: {', '.join(missing)}.")
    if variant.step is not None:
        said.append("It generates token by token at the cost of its state.")
    return said


def _variant_page(name: str, variant: Variant) -> str:
    carried = {"query", "key", "value", "bias", "mask", "key_mask", "params", "rng"}
    given = inspect.signature(variant.fn).parameters.values()
    options = [p for p in given if p.name not in carried | {"dropout_rng"}]
    flags = {
        **variant.capabilities(),
        "step": variant.step is not None,
        "exact": variant.exact,
        "equivariant": variant.equivariant,
        "params": "params" in variant.arguments,
        "random": variant.stochastic,
        "state that is not trained": variant.update is not None,
    }
    honours = report.table(
        list(flags), [["yes" if has else "–" for has in flags.values()]]
    )
    defaults = report.table(
        ["option", "default"],
        [
            [f"`{p.name}`", "" if p.default is p.empty else f"`{p.default!r}`"]
            for p in options
        ],
    )
    path = site_api.paths().get(id(variant.base), f"attn_jax.attention.{name}")
    number = variant.paper.replace(".", "", 1)
    paper = f"arXiv:{variant.paper}" if number.isdigit() else variant.paper or "–"
    advice = "\n".join(f"* {line}" for line in _advice(name, variant))
    bound = (
        f"\n\nIt is `{variant.base.__name__}` with "
        f"{', '.join(f'`{k}={v!r}`' for k, v in variant.options.items())}."
        if variant.options
        else ""
    )
    return f"""# {name}

{variant.summary[:1].upper()}{variant.summary[1:]}. Paper: {paper}. Reference:
{{py:obj}}`{path}`.{bound}

## Should I use it?

{advice}

## What it honours

{honours}

{defaults if options else "It has no options."}

## What it computes

<span id="{path}"></span>

```{{eval-rst}}
.. autofunction:: {path}
   :no-index:
```

## What it costs

Claimed: time {variant.time}, additional memory {variant.memory}.

{_cost(name)}

## What it reached

{_trained(name)}

## Check it

```sh
python -m attn_jax check {name}
python -m attn_jax compare dot_product {name} --lengths 256,1024
python -m attn_jax bench --variant {name} --lengths 256,1024,4096
```
"""


def variants() -> Pages:
    """The zoo: an index, and a page for each row."""
    lines = []
    for name, variant in VARIANTS.items():
        row = arena(name)
        fast = f"{row['against']['dot_product'][0]:.3g}" if row else "–"
        small = report.decimal(row["memory_share"], 3) if row else "–"
        yes = [c for c in CAPABILITIES if getattr(variant, c)]
        has = ", ".join([*yes, *["step"] * (variant.step is not None)])
        lines.append(
            [f"{{doc}}`{name}`", fast, small, variant.time, variant.summary, has]
        )
    header = ["variant", "speed at 4K", "memory at 4K", "time", "what", "honours"]
    toc = "\n".join(VARIANTS)
    yield (
        "variants/index.md",
        f"""# Variants

Every built-in attention function, each with a page that says whether to use it. Speed
and memory are of a training step at 4,096 tokens, as multiples of dense attention's, on
two CPU cores; `blockwise` is exact, so a variant slower than it saves no time. Click on
a heading to sort, type to filter.

{report.table(header, lines)}

```{{toctree}}
:hidden:

{toc}
```
""",
    )
    for name, variant in VARIANTS.items():
        yield f"variants/{name}.md", _variant_page(name, variant)


# ------------------------------------------------------- pages of the repository


def _section(text: str, title: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise LookupError(f"no section {title!r}.")
    return found[1].strip("\n")


def _unlink(text: str) -> str:
    """Links into the repository as plain words: the site has pages of its own."""
    link = r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]*\)"
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # code as it is
    parts[::2] = [re.sub(link, r"\1", part) for part in parts[::2]]
    return "".join(parts)


def claims() -> str:
    """The table of claims, a section each: as a table it is too wide to read."""
    text = (ROOT / "experiments/README.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    parts = [
        """# Claims

What is said of attention, what a paper reports, and what was measured here: mean ±
standard deviation over seeds, differences with Student's intervals of 95 %.
"""
    ]
    for line in lines[1:]:
        claim, paper, ours, command, minutes = line[2:-2].split(" | ")
        parts.append(
            f"## {claim}\n\n{_unlink(ours)}\n\n* Paper: {paper}\n* Command: {command}\n"
            f"* Minutes on two cores: {minutes}"
        )
    return "\n\n".join(parts) + "\n"


def repository() -> Pages:
    """What the repository's own files say."""
    readme = (ROOT / "README.md").read_text("utf-8")
    about = (ROOT / "experiments/README.md").read_text("utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    yield "claims.md", claims()
    limits = _section(about, "What these results do not show")
    yield "limits.md", f"# What the results do not show\n\n{_unlink(limits)}\n"
    counts = about.partition("What makes a number count here:")[2].partition("\n\n")[0]
    yield (
        "design.md",
        f"""# Design

{_unlink(_section(readme, "The contract"))}

## Where what is

{_unlink(_section(contributing, "Where what is"))}

## What makes a number count

{counts.strip()[:1].upper()}{counts.strip()[1:]}

## Running experiments

{_unlink(_section(about, "Running"))}
""",
    )
    yield "contributing.md", _unlink(contributing)
    yield "changelog.md", _unlink((ROOT / "CHANGELOG.md").read_text("utf-8"))


# ----------------------------------------------------------------------- writing


def written(kept: pathlib.Path | None = None) -> Pages:
    """The hand-written pages, their numbers filled in and their code run."""
    for path in [HERE / "index.md", *sorted((HERE / "tutorials").glob("*.md"))]:
        name = str(path.relative_to(HERE))
        page = site_run.run(path.read_text("utf-8"), name, kept)
        yield name, site_numbers.fill(page, "../" * name.count("/"))
    source = site_run.run((HERE / "lecture.md").read_text("utf-8"), "lecture.md", kept)
    for language, page in lecture(source).items():
        yield f"lecture/{language}.md", page


def pages(kept: pathlib.Path | None = None) -> Pages:
    """Every page: path and text."""
    yield from written(kept)
    yield from site_api.pages()
    yield from variants()
    yield from results(kept and kept.with_name("figures"))
    yield from explorer()
    yield from repository()


def write(folder: pathlib.Path, extra: pathlib.Path) -> int:
    """Writes what has changed, removes what is no longer made; how many pages."""
    made = set()
    count = 0
    for name, text in pages(folder.parent / "outputs.json"):
        path = folder / name
        made.add(path)
        count += 1
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    copies = [(folder / name, source) for name, source in _copies()]
    for path, source in [*copies, *((extra / n, s) for n, s in _extras())]:
        made.add(path)
        if not path.is_file() or path.read_bytes() != source.read_bytes():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
    for root in (folder, extra):
        for path in root.rglob("*"):
            if path.is_file() and path not in made:
                path.unlink()
    return count


if __name__ == "__main__":
    total = write(*map(pathlib.Path, sys.argv[1:3]))
    print(f"{total} pages in {sys.argv[1]}")
