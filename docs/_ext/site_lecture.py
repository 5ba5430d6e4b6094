"""The lecture in two languages from one file: `docs/lecture.md`.

A section is `## (name)= English title | 中文標題`. Of its parts, `:::en` and `:::zh`
are for a language alone; equations, code with its output, and the `evidence` block are
for both. What is measured is named once, so the languages cannot differ in a number.

    ```evidence
    verdict: shown
    command: python -m experiments.offsets --preset relations
    theorem: convolution
    of: offsets/relations
    relations_2_heads_1 | two relations, one head | 兩種關係，一個頭
    ```
"""

from __future__ import annotations

import re

import site_numbers
from site_numbers import records, slug

LANGUAGES = ("en", "zh")
WORDS = {
    "title": ("The lecture, statement by statement", "課程內容，逐項檢驗"),
    "measured": ("measured", "量測項目"),
    "value": ("value", "數值"),
    "verdict": ("Verdict", "結論"),
    "command": ("Command", "指令"),
    "theorem": ("Theorem, computed by", "定理，計算指令"),
    "records": ("Records", "紀錄"),
    "cells": ("cells, in all {} minutes of one process", "次執行，單一行程共 {} 分鐘"),
}
VERDICTS = {
    "shown": ("shown", "成立"),
    "partly": ("shown in part", "部分成立"),
    "against": ("not so here", "在此不成立"),
    "open": ("not settled", "尚無定論"),
    "exact": ("true by construction, computed", "由定義成立，並經計算驗證"),
}
ONE_LANGUAGE = re.compile(r"^:::(en|zh)\n(.*?)^:::$\n?", re.M | re.S)
EVIDENCE = re.compile(r"^```evidence\n(.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^## \((\w+)\)= (.*?) \| (.*)$", re.M)


def _minutes(of: str) -> tuple[int, str]:
    """How many cells a folder has, "FOLDER TASK" those of one task; their minutes."""
    folder, _, task = of.partition(" ")
    times = [
        record["wall_time_s"]
        for record in records(folder)
        if not task or record["config"]["task"] == task
    ]
    return len(times), f"{sum(times) / 60:,.0f}"


def _evidence(block: str, language: int, root: str) -> str:
    """What shows a statement, in one language."""
    word = {name: both[language] for name, both in WORDS.items()}
    rows, lines, colon = [], [], (": ", "：")[language]
    for line in block.strip().splitlines():
        if " | " in line:
            name, *labels = line.split(" | ")
            rows.append(f"| {labels[language]} | {site_numbers.text(name, root)} |")
            continue
        key, _, value = line.partition(": ")
        if key == "verdict":
            told = VERDICTS[value][language]
            lines.insert(0, f"* {word['verdict']}{colon}**{told}**")
        elif key == "command":
            lines.append(f"* {word['command']}{colon}`{value}`")
        elif key == "theorem":
            lines.append(f"* {word['theorem']} `python -m attn_jax theorems {value}`")
        elif key == "of":
            count, minutes = _minutes(value)
            folder = value.partition(" ")[0]
            link = f"{{doc}}`{folder} <../results/{slug(folder)}>`"
            told = word["cells"].format(minutes)
            lines.append(f"* {word['records']}{colon}{link}, {count} {told}")
        else:
            raise ValueError(f"evidence: unknown line {line!r}")
    head = [f"| {word['measured']} | {word['value']} |", "|---|---|"] if rows else []
    return "\n".join([*head, *rows, "", *lines])


def lecture(source: str, root: str = "../") -> dict[str, str]:
    """The pages by language.

    Args:
      source: the file, its code run already.
      root: the way from the pages to the site's start.

    Raises:
      LookupError: if a number has no records.
      ValueError: if a line of evidence is none.
    """
    made = {}
    for place, language in enumerate(LANGUAGES):
        page = ONE_LANGUAGE.sub(
            lambda m, kept=language: m[2] if m[1] == kept else "", source
        )
        page = HEADING.sub(lambda m, k=place: f"({m[1]})=\n## {m[2 + k]}", page)
        page = EVIDENCE.sub(lambda m, k=place: _evidence(m[1], k, root), page)
        title = f"# {WORDS['title'][place]}\n\n"
        made[language] = title + site_numbers.fill(page, root)
    # A label is for one page; the second gets its own.
    made["zh"] = re.sub(r"^\((\w+)\)=$", r"(\1-zh)=", made["zh"], flags=re.M)
    return made
