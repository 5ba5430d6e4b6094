"""The site's generators: what `make docs` writes before Sphinx reads it."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest

import attn_jax
from attn_jax import VARIANTS
from experiments.core import run

ROOT = Path(attn_jax.__file__).resolve().parents[1]
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("needs a checkout: docs/ is not installed", allow_module_level=True)
HAND_WRITTEN = [
    DOCS / "index.md",
    DOCS / "lecture.md",
    *sorted((DOCS / "tutorials").glob("*.md")),
]
# What is code or an equation; numbers in it are no results.
CODE = re.compile(r"^```.*?^```$|\$\$.*?\$\$|`[^`\n]*`", re.M | re.S)


@pytest.fixture(scope="module", autouse=True)
def _extensions():
    sys.path.insert(0, str(DOCS / "_ext"))
    yield
    sys.path.remove(str(DOCS / "_ext"))


def module(name: str) -> types.ModuleType:
    return importlib.import_module(f"site_{name}")


def test_every_public_name_is_in_the_reference_once():
    api = module("api")
    pages = dict(api.pages())
    described = re.findall(
        r"^\.\. (?:auto\w+|py:data):: (\S+)$", "\n".join(pages.values()), re.M
    )
    assert len(described) == len(set(described)) > 300
    for name, public_module in api.modules().items():
        assert f"reference/{name}.md" in pages
        assert f"\n{name}\n" in pages["reference/index.md"]
        for public in api.public(public_module):
            page = pages[f"reference/{name}.md"]
            here = re.search(rf"^\.\. [\w:]+:: \S+\.{re.escape(public)}$", page, re.M)
            assert here or f"| `{public}` |" in page, f"{name}.{public}"


def test_what_is_described_is_what_its_path_imports():
    api = module("api")
    for names in api.entries().values():
        for path, value in names.values():
            home, _, name = path.rpartition(".")
            assert getattr(importlib.import_module(home), name) is value


def test_docstrings_are_mended_for_restructured_text():
    lines = [
        "Scores |q| of `key`s, and `a",
        "b`; x_ is none.",
        "",
        "| a | b |",
        "|---|---|",
        "| 1 | `2` |",
        "",
        ">>> 2 * x_",
    ]
    module("api").restructure(lines)
    text = "\n".join(lines)
    assert r"\|q\| of :py:obj:`key`\ s, and ``a b``; x\_ is none." in text
    assert "   * - a\n     - b\n   * - 1\n     - :py:obj:`2`" in text
    assert lines[-1] == ">>> 2 * x_"


def test_examples_in_docstrings_of_the_generators_hold():
    found = doctest.testmod(module("api"))
    assert found.attempted >= 4 and not found.failed


def test_every_number_has_records_and_is_linked_to_them():
    numbers = module("numbers")
    for name, number in numbers.NUMBERS.items():
        shown = numbers.text(name, "../")
        assert re.search(r"\d", number.text()), name
        if hashes := number.hashes():
            assert set(hashes) <= {r["hash"] for r in numbers.records(number.of)}
        assert 'href="../' in shown and ">" + number.text() + "<" in shown


def test_a_number_that_selects_no_or_two_settings_is_an_error():
    numbers = module("numbers")
    for where, count in (({"model": "none such"}, "selects 0"), ({}, "selects ")):
        number = numbers.Mean("offsets/relations", "test_accuracy_known", where)
        with pytest.raises(LookupError, match=count):
            number.text()
    with pytest.raises(LookupError, match="no number 'nonsense'"):
        numbers.fill("{{nonsense}}")


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda path: path.stem)
def test_hand_written_pages_have_no_number_of_their_own(path):
    numbers = module("numbers")
    text = path.read_text("utf-8")
    for name in numbers.NAMED.findall(text):
        assert name in numbers.NUMBERS, name
    for line in CODE.sub("", text).splitlines():
        line = line.replace("3.11 to 3.14", "")  # versions of Python
        assert not re.search(r"\.\d", line), line


def test_both_languages_have_the_same_sections_code_and_numbers():
    lecture = module("lecture")
    source = (DOCS / "lecture.md").read_text("utf-8")
    sections = re.split(r"^(?=## )", source, flags=re.M)[1:]
    assert len(sections) == 16
    for section in sections:
        assert lecture.HEADING.match(section), section[:60]
        assert section.count("\n:::en\n") == section.count("\n:::zh\n") == 1
        assert section.count("```evidence\n") == section.count("```python run\n") == 1
    pages = lecture.lecture(source)
    read = lambda page: re.findall(r'<a class="number".*?</a>', page)  # noqa: E731
    assert len(read(pages["en"])) > 50
    assert read(pages["en"]) == read(pages["zh"])
    for page in pages.values():
        assert ":::" not in page and "{{" not in page and "```evidence" not in page
    assert "結論" in pages["zh"] and "結論" not in pages["en"]


def test_code_is_run_and_what_it_prints_is_shown():
    page = (
        "a\n\n```python file=one.py\nx = 41\n```\n\n```python run\nimport pathlib\n"
        "print('so')\nint(pathlib.Path('one.py').read_text()[4:]) + 1\n```\n\n"
        "```python\nnot run\n```\n"
    )
    shown = module("run").run(page, "page.md")
    assert "```{code-block} python\n:caption: one.py\nx = 41\n```" in shown
    assert "+ 1\n```\n\n```text\nso\n42\n```" in shown
    assert shown.endswith("```python\nnot run\n```\n")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python run\n1 / 0\n```", "page.md, line 4: ZeroDivisionError"),
        ("```sh run\nattn-jax list nonsense\n```", "ended with 2"),
        ("```sh run\nrm file\n```", "only `attn-jax`"),
    ],
)
def test_code_that_fails_stops_the_build_and_is_named(block, message):
    with pytest.raises(module("run").CellError, match=re.escape(message)):
        module("run").run(f"a\n\n{block}\n", "page.md")


def test_outputs_are_kept_until_the_code_changes(tmp_path):
    kept, runner = tmp_path / "outputs.json", module("run")
    page = "```python run\nimport time\ntime.perf_counter()\n```\n"
    first = runner.run(page, "page.md", kept)
    assert runner.run(page, "page.md", kept) == first
    assert runner.run(page.replace("perf_counter", "time"), "page.md", kept) != first


def test_every_variant_has_a_page_that_says_whether_to_use_it():
    made = dict(module("pages").variants())
    assert set(made) == {"variants/index.md"} | {f"variants/{v}.md" for v in VARIANTS}
    for name in VARIANTS:
        page = made[f"variants/{name}.md"]
        for title in ("Should I use it?", "What it honours", "What it costs"):
            assert f"## {title}" in page
        assert f"check {name}" in page
    assert "times as fast as dense" in made["variants/performer.md"]
    assert "results/sequence_labelling-phones" in made["variants/truncated.md"]


def test_a_cell_is_told_by_its_attention():
    variant_of = module("pages").variant_of
    assert variant_of({"model": "transformer", "attention": None}) == "dot_product"
    truncated = {"model": "transformer", "attention": None, "left": 3}
    assert variant_of(truncated) == "truncated"
    assert variant_of({"model": "x", "score": "gatv2"}) == "gatv2"
    assert variant_of({"model": "linear"}) == "linear"
    assert variant_of({"model": "resnet"}) is None
    assert variant_of({"model": "vit", "attention": "mine.py:f"}) is None


def test_every_experiment_and_every_record_is_in_the_results():
    numbers = module("numbers")
    made = dict(module("pages").results())
    for name in run.names():
        assert f"## {name}\n" in made["results/index.md"]
    assert len(numbers.folders()) >= 8
    for key in numbers.folders():
        page = made[f"results/{numbers.slug(key)}-records.md"]
        ids = set(re.findall(r'<tr id="(\w+)">', page))
        assert ids == {record["hash"] for record in numbers.records(key)}
        report = made[f"results/{numbers.slug(key)}.md"]
        figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", report)
        copies = {name for name, _ in module("pages")._copies()}
        assert {f"results/{figure}" for figure in figures} <= copies


def test_the_explorer_has_the_stored_weights():
    pages = module("pages")
    page = dict(pages.explorer())["explorer.md"]
    inside = re.search(r'id="explorer-data">(.*?)</script>', page, re.S)[1]
    shown = json.loads(inside)
    kept = [entry for entries in pages.maps().values() for entry in entries]
    assert [m["weights"] for m in shown] == [m["weights"] for m in kept] != []
    for entry in shown:
        for head in (head for layer in entry["weights"] for head in layer):
            assert len(head) == len(head[0]) == len(entry["ticks"])


def test_points_of_a_figure_say_their_values():
    pytest.importorskip("matplotlib")
    from experiments.core import plots

    figures = module("figures")
    figure, ((axes,),) = plots.subplots((4, 3))
    axes.plot([10, 1_000], [0.25, 0.5], label="a <b>", marker="o")
    axes.errorbar([1_000], [0.5], yerr=[[0.1], [0.1]], fmt="none")
    axes.plot(range(500), range(500), label="a curve")
    drawn = figures.svg(figure, "mine")
    said = re.findall(r"<title>(.*?)</title>", drawn)
    assert said == ["a &lt;b&gt;: 0.25 at 10", "a &lt;b&gt;: 0.5 ± 0.1 at 1000"]
    ids = re.findall(r' id="([^"]*)"', drawn)
    assert len(ids) == len(set(ids)) and all(i.startswith("mine-") for i in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', drawn)) <= set(ids)
    page = figures.placed("a ![what it is](x.png) b ![c](y.png)", {"x.png": drawn})
    assert 'aria-label="what it is"' in page and "![c](y.png)" in page


def test_claims_have_a_section_each_and_repository_links_are_gone():
    made = dict(module("pages").repository())
    table = (ROOT / "experiments/README.md").read_text("utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert made["claims.md"].count("\n## ") == len(rows) - 1 > 10
    for name, page in made.items():
        assert not re.search(r"\]\((?!https?:)[\w./]+\.md", page), name


def test_equations_are_mathml():
    pytest.importorskip("sphinx", reason="needs Sphinx: make install")
    tex = re.findall(r"\$\$\n(.*?)\$\$", (DOCS / "lecture.md").read_text("utf-8"), re.S)
    convert = module("math").tex2mathml
    assert len(tex) == 16
    for equation in tex:
        assert "<math" in convert(equation, as_block=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda path: path.stem)
def test_the_code_of_every_page_runs_and_shows_what_it_says(path):
    name, kept = str(path.relative_to(DOCS)), DOCS / "_build/outputs.json"  # if built
    printed = module("run").printed(path.read_text("utf-8"), name, kept)
    # Only one thing is shown not to be so: that positions leave nothing changed.
    assert sum("False" in out for out in printed) == (path.stem == "lecture")
