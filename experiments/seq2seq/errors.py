"""How far a written sequence is from what is right: edits, of symbols and of words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein


def nearest(
    written: Sequence[int], references: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """Edits to the nearest reference, and how long that is.

    Edits are insertions, deletions and substitutions of one symbol; of references that
    are as near, the longest counts.

    >>> nearest([1, 2, 3], [[1, 3], [9, 9, 9, 9]])
    (1, 2)
    """
    found = [(Levenshtein.distance(written, r), -len(r)) for r in references]
    edits, length = min(found)
    return edits, -length


def rates(
    written: Sequence[Sequence[int]], references: Sequence[Sequence[Sequence[int]]]
) -> dict[str, float]:
    """Error rates of many sequences, each with one reference or several.

    Args:
      written: what a model wrote.
      references: what is right, for each.

    Returns:
      "per", edits over the symbols of the nearest references, and "wer", the share of
      sequences that are none of their references.

    Raises:
      ValueError: there are none, or not as many of the one as of the other.

    >>> rates([[1, 2], [3]], [[[1, 2]], [[3, 4], [5, 6]]])
    {'per': 0.25, 'wer': 0.5}
    """
    if not written or len(written) != len(references):
        raise ValueError(
            "written must be one sequence for each of references, at least one, got "
            f"{len(written)} for {len(references)}."
        )
    found = np.array([nearest(*pair) for pair in zip(written, references, strict=True)])
    edits, lengths = found[:, 0], found[:, 1]
    return {
        "per": float(edits.sum() / lengths.sum()),
        "wer": float((edits > 0).mean()),
    }
