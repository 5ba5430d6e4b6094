"""What the READMEs say: the example runs, and every figure is in the results."""

from __future__ import annotations

import json
import pathlib
import re
import statistics

import jax.numpy as jnp
import pytest
from flax import nnx

import attn_jax

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "data_scaling" / "results" / "results.jsonl"
FAMILIES = {"ViT": "vit", "ResNet": "resnet", "hybrid": "hybrid"}
# "ViT .891 ± .002", with the N of the sentence after it: "at N = 60,000".
QUOTED = re.compile(r"(ViT|ResNet|hybrid)(?: \(([a-z_]+)\))? (\.\d{3}) ± (\.\d{3})")


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_example_variant_runs_as_written(tmp_path, monkeypatch):
    variant, use = _blocks("python")
    assert len(variant.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cosine.py").write_text(variant)
    names: dict[str, object] = {}
    exec(compile(use, "README.md", "exec"), names)
    layer = names["layer"]
    assert isinstance(layer, nnx.MultiHeadAttention)
    assert layer(jnp.ones((2, 3, 64))).shape == (2, 3, 64)
    record = attn_jax.resolve("cosine.py:cosine")
    assert record.mask and record.bias and record.key_mask and record.causal


@pytest.mark.parametrize("file", ["README.md", "experiments/README.md"])
def test_every_quoted_accuracy_is_in_the_results(file):
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    final = [r for r in records if r["config"]["phase"] == "final"]
    text = re.sub(r"\s+", " ", (ROOT / file).read_text())
    quotes = list(QUOTED.finditer(text))
    assert quotes
    for quote in quotes:
        family, size, mean, std = quote.groups()
        at = re.search(r"at N = ([\d,]+)(?: (scenes|images))?", text[quote.end() :])
        assert at is not None, f"{quote[0]}: no N follows"
        n, scenes = int(at[1].replace(",", "")), at[2] == "scenes"
        values = [
            r["metrics"]["test_accuracy"]
            for r in final
            if r["config"]["model"] == FAMILIES[family]
            and r["config"]["size"] == (size or "mu")
            and r["config"]["n"] == n
            and r["config"]["task"].startswith("scenes") == scenes
        ]
        assert len(values) >= 3, f"{quote[0]}: {len(values)} seeds"
        said = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        assert f"{mean} ± {std}" == said.replace("0.", "."), (quote[0], n, said)
