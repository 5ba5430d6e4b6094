"""Average precision of detections, by the reference code of COCO.

Lin et al., 2014, arXiv:1405.0312; AP is the mean over overlaps from .5 to .95 in steps
of .05, and over classes; AP50 and AP75 are at one overlap.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

import numpy as np

from experiments.data.detection import NO_ITEM, Scenes

# Borders of small, medium and large, as shares of a picture's area. COCO's are 32² and
# 96² pixels in pictures of about 640 by 480; ours have items of 1/6 to 2/5 of a side.
BORDERS = (0.03, 0.09)
_NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
UNIT = 1_000.0  # a picture's side, in what boxes are told to the reference code


class Detections(NamedTuple):
    """What was told of pictures, D boxes each.

    Attributes:
      scores: float [n, D]; 0 or less = not told.
      labels: int [n, D].
      boxes: float [n, D, 4]: centre, width and height, as shares of the picture.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def _entries(labels: np.ndarray, boxes: np.ndarray) -> list[dict[str, Any]]:
    """Rows of COCO's format; ids count from 1, as 0 means "none" to its code."""
    found: list[dict[str, Any]] = []
    for picture, kinds in enumerate(labels):
        for kind, box in zip(kinds.tolist(), boxes[picture].tolist(), strict=True):
            x, y, width, height = (UNIT * value for value in box)
            found.append(
                dict(
                    id=len(found) + 1,
                    image_id=picture + 1,
                    category_id=kind + 1,
                    bbox=[x - width / 2, y - height / 2, width, height],
                    area=width * height,
                    iscrowd=0,
                )
            )
    return found


def average_precision(
    found: Detections, truth: Scenes, num_classes: int
) -> dict[str, float]:
    """AP, AP50, AP75, and AP of small, medium and large items.

    Args:
      found: what was told.
      truth: what is there.
      num_classes: K.

    Returns:
      By name; what there is no item of is left out.

    Raises:
      ValueError: if they are of another number of pictures.

    >>> there = Scenes(np.zeros((1, 8, 8, 1), np.uint8),
    ...                np.array([[[0.5, 0.5, 0.5, 0.5]]], np.float32),
    ...                np.array([[0]]))
    >>> told = Detections(np.array([[0.9]]), there.labels, there.boxes)
    >>> round(average_precision(told, there, 1)["ap"], 6)
    1.0
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(found.scores) != len(truth):
        raise ValueError(
            f"found must be of {len(truth)} pictures, got {len(found.scores)}."
        )
    told = _entries(found.labels, found.boxes)
    scores = found.scores.ravel().tolist()
    told = [x | {"score": s} for x, s in zip(told, scores, strict=True) if s > 0]
    there = _entries(truth.labels, truth.boxes)
    there = [x for x in there if x["category_id"] != NO_ITEM + 1]
    ids = list(range(1, len(truth) + 1))
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = dict(
            images=[dict(id=i) for i in ids],
            annotations=there,
            categories=[dict(id=k + 1) for k in range(num_classes)],
        )
        known.createIndex()
        if not told:
            return dict.fromkeys(_NAMES[:3], 0.0)
        other = COCO()
        other.dataset = known.dataset | dict(annotations=told)
        other.createIndex()
        judge = COCOeval(known, other, "bbox")
        low, high = (border * UNIT**2 for border in BORDERS)
        judge.params.areaRng = [
            [0, 1e10],
            [0, low],
            [low, high],
            [high, 1e10],
        ]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    values = zip(_NAMES, judge.stats[:6].tolist(), strict=True)
    return {name: value for name, value in values if value >= 0}
