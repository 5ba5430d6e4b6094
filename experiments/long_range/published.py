"""Accuracies that others published on the official tasks, in percent.

They are of other data, lengths and, in the first paper, other models for each task:
they stand beside ours for the order of the variants, not for the level.
"""

from __future__ import annotations

from collections.abc import Mapping

COLUMNS = ("listops", "text", "retrieval", "image", "pathfinder")

SOURCES: Mapping[str, str] = {
    "LRA": "Tay et al., arXiv:2011.04006, as in the README of google-research/"
    "long-range-arena: sizes and rates differ from task to task, one run each",
    "Nyströmformer": "Xiong et al., arXiv:2102.03902, as in img/LRA.png of mlpen/"
    "Nystromformer: 2 layers of width 64",
    "Skyformer": "Chen et al., arXiv:2111.00035: 2 layers of width 64, 3 seeds",
    "S4": "Gu et al., arXiv:2111.00396, updated",
}

_TABLES: Mapping[str, str] = {
    "LRA": """
softmax            36.37 64.27 57.46 42.44 71.40
block_local        15.82 52.98 53.39 41.46 66.63
sparse_strided     17.07 63.58 59.59 44.24 71.71
longformer         35.63 62.85 56.89 42.22 69.71
linformer          35.70 53.94 52.27 38.56 76.34
reformer           37.27 56.10 53.40 38.07 68.50
sinkhorn           33.67 61.20 53.83 41.23 67.45
synthesizer_dense  36.99 61.68 54.67 41.61 69.45
bigbird            36.05 64.02 59.29 40.83 74.87
linear             16.13 65.90 53.09 42.34 75.30
performer          18.01 65.40 53.82 42.77 77.05
""",
    "Nyströmformer": """
softmax            37.10 65.02 79.35 38.20 74.16
reformer           19.05 64.88 78.64 43.29 69.36
linformer          37.25 55.91 79.37 37.84 67.60
performer          18.80 63.81 78.62 37.07 69.87
nystromformer      37.15 65.52 79.56 41.58 70.94
""",
    "Skyformer": """
softmax            38.37 61.95 80.69 40.57 65.26
linformer          37.45 58.93 78.19 37.96 60.93
performer          38.02 64.19 80.04 41.43 66.30
reformer           37.68 62.93 78.99 48.87 66.49
bigbird            39.25 63.86 80.28 43.16 68.72
""",
    "S4": """
s4d                59.60 86.82 90.90 88.65 94.20
""",
}

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    source: {
        model: dict(zip(COLUMNS, map(float, numbers), strict=True))
        for model, *numbers in map(str.split, text.strip().splitlines())
    }
    for source, text in _TABLES.items()
}
"""Source -> model, by our names -> task -> accuracy in percent."""
