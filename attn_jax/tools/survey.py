"""The table of the survey of efficient Transformers (arXiv:2009.06732), beside ours.

Its Table 1 names, for each model, what kind of sparsity or summary it has, and how its
cost grows with the length. Each row here says which variant that is, what the variant
claims, and how its FLOPs grow as counted in the traced program.
"""

from __future__ import annotations

import dataclasses

from attn_jax.tools.bench import Setting
from attn_jax.tools.cost import count_flops, fit_exponent
from attn_jax.tools.text import aligned
from attn_jax.variant import resolve

__all__ = ["SURVEY", "Row", "survey_table"]

KINDS = {
    "FP": "fixed pattern",
    "M": "memory",
    "DS": "downsampling",
    "LR": "low rank",
    "RC": "recurrence",
    "LP": "learnable pattern",
    "KR": "kernel",
    "S": "sparse experts",
}
LENGTHS = (1_024, 2_048, 4_096)
HEAD_DIM = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the survey's table.

    Attributes:
      model: as the survey calls it.
      kind: which of `KINDS` it is, joined by "+".
      said: its cost there; N is the length.
      ours: names of variants; none where `why` says why.
      why: what stands in its place, or in the way.
    """

    model: str
    kind: str
    said: str
    ours: tuple[str, ...] = ()
    why: str = ""


_DENSE = "its layers of experts replace the feed-forward part: no other attention"

SURVEY: tuple[Row, ...] = (
    Row("Memory Compressed", "FP+M", "O(Nc²)", ("memory_compressed",)),
    Row("Image Transformer", "FP", "O(N·m)", ("block_local",)),
    Row("Set Transformer", "M", "O(k·N)", ("isab",)),
    Row("Transformer-XL", "RC", "O(N²)", ("transformer_xl",)),
    Row("Sparse Transformer", "FP", "O(N·√N)", ("sparse_strided", "sparse_fixed")),
    Row("Reformer", "LP", "O(N·log N)", ("reformer",)),
    Row("Routing Transformer", "LP", "O(N·√N)", ("routing",)),
    Row("Axial Transformer", "FP", "O(N·√N)", ("axial",)),
    Row("Compressive Transformer", "RC", "O(N²)", ("compressive",)),
    Row("Sinkhorn Transformer", "LP", "O(B²)", ("sinkhorn",)),
    Row("Longformer", "FP+M", "O(n·(k+m))", ("longformer",)),
    Row("ETC", "FP+M", "O(Ng²+N·Ng)", ("etc",)),
    Row("Synthesizer", "LR+LP", "O(N²)", ("synthesizer_dense", "synthesizer_random")),
    Row("Performer", "KR", "O(N)", ("performer",)),
    Row(
        "Funnel Transformer",
        "FP+DS",
        "O(N²)",
        why="fewer outputs than inputs: it pools between layers, and attends densely: "
        "attn_jax.nn.FunnelEncoder",
    ),
    Row("Linformer", "LR", "O(N)", ("linformer",)),
    Row("Linear Transformer", "KR", "O(N)", ("linear",)),
    Row("BigBird", "FP+M", "O(N)", ("bigbird",)),
    Row("Random Feature Attention", "KR", "O(N)", ("rfa", "rfa_gate")),
    Row("Long-Short Transformer", "FP+LR", "O(k·N)", ("long_short",)),
    Row("Poolingformer", "FP+M", "O(N)", ("poolingformer",)),
    Row("Nyströmformer", "M+DS", "O(k·N)", ("nystromformer",)),
    Row("Perceiver", "M", "O(k·N)", ("perceiver",)),
    Row("Clusterformer", "LP", "O(N·log N)", ("clusterformer",)),
    Row("Luna", "M", "O(k·N)", ("luna",)),
    Row(
        "TokenLearner",
        "DS",
        "O(k²)",
        why="it shortens the sequence before the layer, which attends densely",
    ),
    Row("Adaptive Sparse", "S", "O(N²)", why="α-entmax over all pairs: not written"),
    Row("Product Key Memory", "S", "O(N²)", why="a memory in place of feed-forward"),
    *(
        Row(model, "S", "O(N²)", why=_DENSE)
        for model in (
            "Switch Transformer",
            "ST-MoE",
            "GShard",
            "Scaling Transformers",
            "GLaM",
        )
    ),
)
"""What Table 1 of the survey's third version names."""


def _growth(name: str) -> float | None:
    """The exponent of T in the FLOPs of a variant with its default options."""
    setting = Setting(LENGTHS, heads=1, head_dim=HEAD_DIM, batch=1)
    attend = setting.of_variant(resolve(name))
    counts = [
        count_flops(attend, *setting.inputs(length, abstract=True)).total
        for length in LENGTHS
    ]
    return fit_exponent(LENGTHS, counts)


def survey_table() -> str:
    """All rows: the survey's cost, our variants, their claims, and counted growth."""
    cells = [("model", "kind", "said", "ours", "claimed", "FLOPs ~")]
    notes = []
    for row in SURVEY:
        for name in row.ours or ("-",):
            claimed = slope = "-"
            if row.ours:
                claimed = resolve(name).time or "-"
                grown = _growth(name)
                slope = "-" if grown is None else f"T^{grown:.2f}"
            cells.append((row.model, row.kind, row.said, name, claimed, slope))
        if row.why:
            notes.append((row.model, row.why))
    lines = aligned(cells, others="<")
    kinds = "; ".join(f"{short} {name}" for short, name in KINDS.items())
    lines += ["", *aligned(notes, others="<"), ""]
    lines.append(f"FLOPs: forward, counted over T = 1,024 to 4,096, defaults. {kinds}.")
    return "\n".join(lines)
