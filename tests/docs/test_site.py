"""The site as a reader meets it: `make docs`, then every page in a real browser.

Needs Chromium (Debian: `apt install chromium`) and `pip install '.[browser]'`.
"""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import attn_jax

ROOT = Path(attn_jax.__file__).resolve().parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("needs a checkout: docs/ is not installed", allow_module_level=True)
pytest.importorskip("sphinx", reason="needs Sphinx: make install")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs a driver: pip install '.[browser]'"
)
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt install chromium", allow_module_level=True)
pytestmark = pytest.mark.slow

HTML = ROOT / "docs/_build/html"
MAIN = (
    "index.html",
    "lecture/en.html",
    "lecture/zh.html",
    "tutorials/variant.html",
    "variants/index.html",
    "variants/performer.html",
    "reference/attn_jax.attention.local.html",
    "results/index.html",
    "results/offsets-k_back.html",
    "results/long_range-quick-records.html",
    "explorer.html",
    "claims.html",
)


@pytest.fixture(scope="module")
def site() -> Path:
    """The built site; code of pages that have not changed is not run again."""
    done = subprocess.run(
        ["make", "-o", "install", "docs", f"BIN={Path(sys.executable).parent}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return HTML


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # A sandbox of its own is refused to root.
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield found
        found.close()


@pytest.fixture
def page(browser, site) -> Iterator[Any]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


def test_every_page_loads_without_an_error_or_a_request_that_leaves_the_site(
    page, site
):
    troubles = []
    page.on("pageerror", lambda error: troubles.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda r: troubles.append(f"{page.url}: no {r.url}"))
    page.on(
        "console",
        lambda said: said.type == "error" and troubles.append(f"{page.url}: {said}"),
    )
    page.on(
        "request",
        lambda r: (
            r.url.startswith((site.as_uri(), "data:"))
            or troubles.append(f"asks {r.url}")
        ),
    )
    page.set_default_timeout(120_000)  # records of hundreds of cells, on a busy machine
    paths = sorted(site.rglob("*.html"))
    assert len(paths) > 200
    for path in paths:
        page.goto(path.as_uri())
    assert not troubles, troubles[:10]


class _Links(html.parser.HTMLParser):
    """What a page links to, and what on it can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.add(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.places.add(value or "")


def test_no_link_within_the_site_is_broken(site):
    pages = {
        path: _Links(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))
    }
    broken, tried = [], 0
    for path, found in pages.items():
        for link in found.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, place = link.partition("#")
            there = (path.parent / urllib.parse.unquote(target.split("?")[0])).resolve()
            there = there if target else path
            place = urllib.parse.unquote(place)
            known = there not in pages or place in pages[there].places
            tried += 1
            if not there.exists() or not known:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert tried > 10_000
    assert not broken, broken[:20]


def test_search_finds_a_variant(page, site):
    page.goto(f"{(site / 'search.html').as_uri()}?q=linformer")
    page.locator("#search-results ul.search li a").first.wait_for()
    links = page.locator("#search-results ul.search li a")
    found = [links.nth(i).get_attribute("href") for i in range(links.count())]
    assert any("variants/linformer.html" in link for link in found), found


def _shown(page) -> list[list[float]]:
    """The weights that the explorer shows, a row a head."""
    read = (
        "rows => rows.map(r => [...r.querySelectorAll('td')]"
        ".map(c => [c.dataset.weight, c.title]))"
    )
    rows = page.locator("table.maps tbody tr").evaluate_all(read)
    for row in rows:
        assert all(title.endswith(f": {weight}") for weight, title in row)
    return [[float(weight) for weight, _ in row] for row in rows]


@pytest.mark.parametrize("way", ["mouse", "keyboard", "phone"])
def test_the_explorer_shows_the_stored_weights(browser, site, way):
    narrow = {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}
    context = browser.new_context(**(narrow if way == "phone" else {}))
    page = context.new_page()
    page.goto((site / "explorer.html").as_uri())
    maps = json.loads(page.locator("#explorer-data").text_content())
    assert len(maps) >= 3
    for at, entry in enumerate(maps):
        page.locator("#explorer select").select_option(str(at))
        heads = [head for layer in entry["weights"] for head in layer]
        buttons = page.locator("table.maps thead button")
        assert buttons.count() == len(entry["ticks"])
        for query in (0, 2, len(entry["ticks"]) - 1):
            if way == "keyboard":
                buttons.nth(query).focus()
            else:
                buttons.nth(query).hover()
            assert _shown(page) == [head[query] for head in heads]
            assert buttons.nth(query).get_attribute("aria-pressed") == "true"
    if way == "phone":  # what is too wide scrolls in its own place
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390
    context.close()


def _column(page, at: int) -> list[str]:
    cells = page.locator(f"article table tbody tr:visible td:nth-child({at})")
    return cells.all_text_contents()


def test_tables_sort_and_filter(page, site):
    page.goto((site / "variants/index.html").as_uri())
    headings = page.locator("article table thead th").all_text_contents()
    at = headings.index("speed at 4K") + 1
    heading = page.locator(f"article table thead th:nth-child({at})")
    before = _column(page, 1)
    heading.click()
    speeds = [float(text) for text in _column(page, at) if text[:1].isdigit()]
    assert len(speeds) > 30 and speeds == sorted(speeds)
    heading.press("Enter")
    speeds = [float(text) for text in _column(page, at) if text[:1].isdigit()]
    assert speeds == sorted(speeds, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    assert sorted(_column(page, 1)) == sorted(before) != _column(page, 1)
    page.locator("input.filter").fill("linformer")
    assert [name.strip() for name in _column(page, 1)] == ["linformer"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_can_be_read_by_everyone(browser, site, scheme):
    context = browser.new_context(color_scheme=scheme)
    # Nothing but colours depends on the scheme.
    asked = None if scheme == "light" else {"runOnly": ["color-contrast"]}
    found = []
    for name in MAIN:
        page = context.new_page()
        page.goto((site / name).as_uri())
        for trouble in axe.Axe().run(page, options=asked).response["violations"]:
            if trouble["id"] == "definition-list":
                continue  # Sphinx writes a long signature's parameters so
            if trouble["impact"] in ("serious", "critical"):
                where = trouble["nodes"][0]["html"][:120]
                found.append(f"{name}: {trouble['id']}: {where}")
        page.close()
    context.close()
    assert not found, found


def test_a_point_of_a_figure_is_under_the_pointer_and_says_its_value(page, site):
    page.goto((site / "results/offsets-k_back.html").as_uri())
    marks = page.locator(".drawn g:has(> title)")
    assert marks.count() > 20
    for at in (0, marks.count() - 1):
        mark = marks.nth(at)
        mark.scroll_into_view_if_needed()
        mark.locator("use").hover()  # fails where something else lies above it
        words = mark.locator("title").text_content()
        assert re.match(r".+: [\d.,]+( ± [\d.e-]+)? at [\d,.]+$", words)


def test_a_number_leads_to_its_record(page, site):
    page.goto((site / "index.html").as_uri())
    number = page.locator("a.number").first
    said = number.text_content()
    number.click()
    page.wait_for_url("**/results/data_scaling-records.html#*")
    row = page.locator("tr:target")
    assert "attention" in row.text_content()
    assert re.match(r"\.\d{3} ± \.\d{3}$", said)
