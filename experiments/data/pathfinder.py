"""Pathfinder: do two discs lie at the ends of one dashed contour, or of two?

An image has two long contours whose first dashes are near one another, short ones that
distract, and two discs: at the first end of a long contour, and at the last end of the
same (label 1) or of the other (label 0). Contours never come near one another or
themselves, so that what belongs together can be told: dashes of one contour follow one
another at `Canvas.gap`, all others keep `Canvas.apart`.

Source: Linsley et al., 2018, arXiv:1805.08315; sizes as Long Range Arena has them (Tay
et al., 2020, arXiv:2011.04006). The drawing is our own: a dash is ink by the distance
to a segment, so grey at its edges.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.fetch import kept, seal
from experiments.data.splits import check_int
from experiments.data.symbols import Fold, SymbolData

LEVELS = {"easy": 6, "intermediate": 9, "hard": 14}
"""Dashes of a long contour, by difficulty."""

TRIES = 512  # images that are drawn at once
TURNS = 12  # directions that are tried for a dash
BACK = 4  # most dashes that a stuck contour goes back
PATIENCE = 6  # tries for each dash of long contours, all in all
FAR = 1e6
FAINT = 20  # grey levels up to this are no ink


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Sizes in pixels, angles in radians.

    Attributes:
      side: of the image.
      dash, gap: length of a dash, and between two of a contour.
      thickness: of a dash.
      disc: radius of a disc.
      seeds: between the first ends of the two long contours.
      apart: least distance between dashes that do not follow one another.
      turn: most that a dash turns away from the one before.
      distractors: dashes of all short contours together, about.
    """

    side: int = 32
    dash: float = 2.0
    gap: float = 1.0
    thickness: float = 0.5
    disc: float = 1.5
    seeds: float = 7.0
    apart: float = 3.0
    turn: float = 0.9
    distractors: int = 20

    def short(self, length: int) -> tuple[int, int]:
        """How many short contours there are, and of how many dashes."""
        dashes = max(1, length // 3)
        return self.distractors // dashes, dashes


CANVASES = {
    32: Canvas(),
    128: Canvas(128, 5.0, 2.0, 1.5, 3.0, 20.0, 5.0, 0.7, 35),
}
"""By side; of 128 x 128 (Path-X) the paper names no length of a dash: 5 is our own."""


class Drawing(NamedTuple):
    """n drawings of M dashes, those of the long contours first.

    Attributes:
      dashes: [n, M, 2, 2], (y, x) of both ends; `FAR` away where there is none.
      discs: [n, 2, 2], (y, x).
      labels: int [n].
    """

    dashes: np.ndarray
    discs: np.ndarray
    labels: np.ndarray


def _toward(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1)


class _Page:
    """Drawings in progress: what is drawn keeps what comes later away."""

    def __init__(
        self, canvas: Canvas, count: int, most: int, random: np.random.Generator
    ):
        self.canvas, self.random = canvas, random
        self.dashes = np.full((count, most, 2, 2), FAR, np.float32)
        self.angles = np.zeros((count, most), np.float32)
        self.used = most  # dashes beyond are not drawn yet

    def put(
        self,
        rows: np.ndarray,
        at: np.ndarray,
        after: np.ndarray,
        start: np.ndarray,
        angle: np.ndarray,
    ) -> np.ndarray:
        """Draws a dash in some drawings, at the first of K places that is free.

        One behind which there is room for another dash goes before.

        Args:
          rows: int [m], which drawings.
          at: int [m], the number of the dash.
          after: int [m], the number of the dash that it follows and may touch; ``at``
            itself where there is none.
          start: float [m, K, 2].
          angle: float [m, K].

        Returns:
          bool [m], whether one was free.
        """
        canvas, each = self.canvas, np.arange(len(rows))
        others = self.dashes[rows][:, : self.used]
        inside = after < self.used
        others[each[inside], after[inside]] = FAR
        middle = others.mean(axis=2)
        others = np.concatenate([others[:, :, 0], middle, others[:, :, 1]], axis=1)
        start, angle = start.astype(np.float32), angle.astype(np.float32)
        toward = _toward(angle)
        end = start + canvas.dash * toward
        free = np.ones(angle.shape, bool)
        for point in (start, (start + end) / 2, end):
            free &= self._free(point, others)
        beyond = end + (canvas.gap + canvas.dash) * toward
        chosen = (free + (free & self._free(beyond, others))).argmax(axis=1)
        ok = np.asarray(free.any(axis=1))
        both = np.stack([start, end], axis=2)[each, chosen]
        self.dashes[rows, at] = np.where(ok[:, None, None], both, FAR)
        self.angles[rows, at] = angle[each, chosen]
        return ok

    def _free(self, points: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Which of K points [m, K, 2] lie inside, and apart from others [m, Q, 2]."""
        edge = 1 + self.canvas.thickness
        inside = (points >= edge) & (points <= self.canvas.side - 1 - edge)
        y, x = (points[:, :, None, i] - others[:, None, :, i] for i in (0, 1))
        near = (y * y + x * x).min(axis=2)
        return inside.all(axis=2) & (near >= self.canvas.apart**2)

    def follow(
        self, rows: np.ndarray, at: np.ndarray, before: np.ndarray
    ) -> np.ndarray:
        """Draws dashes behind others of their drawings, bent at random."""
        canvas = self.canvas
        turns = self.random.uniform(-canvas.turn, canvas.turn, (len(rows), TURNS))
        angle = self.angles[rows, before][:, None] + turns
        start = self.dashes[rows, before, 1][:, None] + canvas.gap * _toward(angle)
        return self.put(rows, at, before, start, angle)

    def two(self, length: int) -> np.ndarray:
        """Draws two long contours in turn; where one is stuck, both go back a little.

        Returns:
          The drawings in which both are whole.
        """
        canvas, count, random = self.canvas, len(self.dashes), self.random
        self.used = 2 * length
        middle = random.uniform(-1, 1, (count, 1, 2)) * canvas.side / 8
        middle += (canvas.side - 1) / 2
        angle = random.uniform(-np.pi, np.pi, (count, 3, TURNS))
        beside = middle + canvas.seeds * _toward(angle[:, 2])
        every, none = np.arange(count), np.zeros(count, int)
        ok = self.put(every, none, none, middle, angle[:, 0, :1])
        ok &= self.put(every, none + length, none + length, beside, angle[:, 1])
        # Dash number of the place in turn: 0, length, 1, length + 1, …
        order = np.arange(2 * length).reshape(2, length).T.reshape(-1)
        done = np.where(ok, 2, 0)
        for _ in range(PATIENCE * 2 * length):
            rows = np.flatnonzero((done >= 2) & (done < 2 * length))
            if not len(rows):
                break
            turn = done[rows]
            ok = self.follow(rows, order[turn], order[turn - 2])
            back = random.integers(2, 2 * BACK, len(rows))
            now = np.where(ok, turn + 1, np.maximum(turn - back, 2))
            for row, low, high in zip(rows[~ok], now[~ok], turn[~ok], strict=True):
                self.dashes[row, order[low:high]] = FAR
            done[rows] = now
        return np.flatnonzero(done == 2 * length)


def draw(
    random: np.random.Generator, count: int, length: int, canvas: Canvas
) -> Drawing:
    """Tries ``count`` drawings; those whose long contours found no room are left out.

    Args:
      random: draws.
      count: how many to try.
      length: dashes of a long contour.
      canvas: sizes.
    """
    contours, dashes = canvas.short(length)
    page = _Page(canvas, count, 2 * length + contours * dashes, random)
    whole = page.two(length)
    page.dashes, page.angles = page.dashes[whole], page.angles[whole]
    n = len(whole)
    rows, zero = np.arange(n), np.zeros(n, int)
    for contour in range(contours):
        first = 2 * length + contour * dashes
        start = random.uniform(0, canvas.side - 1, (n, 4 * TURNS, 2))
        angle = random.uniform(-np.pi, np.pi, (n, 4 * TURNS))
        ok = page.put(rows, zero + first, zero + first, start, angle)
        for at in range(first + 1, first + dashes):
            page.used = at
            ok &= page.follow(rows, zero + at, zero + at - 1)
        page.used = first + dashes
        # One that found no room for all its dashes is none.
        page.dashes[~ok, first : first + dashes] = FAR
    labels, one = random.integers(0, 2, n), random.integers(0, 2, n)
    other = np.where(labels == 1, one, 1 - one)
    begins = page.dashes[rows, one * length, 0]
    ends = page.dashes[rows, other * length + length - 1, 1]
    return Drawing(page.dashes, np.stack([begins, ends], axis=1), labels)


def ink(drawing: Drawing, canvas: Canvas) -> np.ndarray:
    """Grey levels of drawings, uint8 [n, side, side]."""
    count, side = len(drawing.labels), canvas.side
    image = np.zeros((count, side * side), np.float32)
    ends = drawing.dashes
    reach = int(np.ceil(canvas.dash / 2 + canvas.thickness + 1))
    _blot(image, side, ends[:, :, 0], ends[:, :, 1], canvas.thickness / 2, reach)
    reach = int(np.ceil(canvas.disc + 1))
    _blot(image, side, drawing.discs, drawing.discs, canvas.disc, reach)
    return np.rint(255 * image).astype(np.uint8).reshape(count, side, side)


def _blot(
    image: np.ndarray,
    side: int,
    start: np.ndarray,
    end: np.ndarray,
    radius: float,
    reach: int,
) -> None:
    """Inks what is within a radius of segments [n, M, 2], half a pixel softly."""
    real = np.flatnonzero(start[..., 0].reshape(-1) < FAR / 2)
    row = real // start.shape[1]
    start, end = (x.reshape(-1, 2)[real] for x in (start, end))
    square = np.arange(-reach, reach + 1)
    offsets = np.stack(np.meshgrid(square, square, indexing="ij"), axis=-1)
    pixels = np.rint((start + end) / 2)[:, None] + offsets.reshape(1, -1, 2)
    along = (end - start)[:, None]
    away = pixels - start[:, None]
    length = np.maximum((along**2).sum(axis=-1), 1e-9)
    share = np.clip((away * along).sum(axis=-1) / length, 0, 1)
    distance = np.sqrt(((away - share[..., None] * along) ** 2).sum(axis=-1))
    shade = np.clip(radius + 0.5 - distance, 0, 1).astype(np.float32)
    seen = ((pixels >= 0) & (pixels < side)).all(axis=-1) & (shade > 0)
    at = pixels[..., 0] * side + pixels[..., 1] + row[:, None] * side * side
    np.maximum.at(image.reshape(-1), at[seen].astype(np.int64), shade[seen])


def joined(images: np.ndarray) -> np.ndarray:
    """Whether ink joins the two discs, by flooding: bool [n]; nothing is learnt.

    It errs where contours pass so near one another that their grey edges touch.

    Args:
      images: uint8 [n, side, side]; discs are what is fully bright.

    >>> images = np.zeros((2, 9, 9), np.uint8)
    >>> images[:, 4, [1, 7]], images[0, 4, 2:7] = 255, 90
    >>> joined(images).tolist()
    [True, False]
    """
    from scipy import ndimage

    square = np.ones((3, 3))
    found = []
    for image in images:
        discs, count = ndimage.label(image == 255, square)
        parts, _ = ndimage.label(image > FAINT, square)
        begins = [parts[discs == disc][0] for disc in range(1, count + 1)]
        found.append(len(set(begins)) == 1)
    return np.array(found)


def drawings(
    random: np.random.Generator, count: int, length: int, canvas: Canvas
) -> Iterator[Drawing]:
    """Drawings until there are so many, some at a time.

    Raises:
      ValueError: contours of this length find no room.
    """
    left = count
    while left:
        found = draw(random, TRIES, length, canvas)
        if not len(found.labels):
            raise ValueError(
                f"length must leave room for two contours on {canvas.side} x "
                f"{canvas.side} pixels, got {length} dashes."
            )
        yield Drawing(*(x[:left] for x in found))
        left -= min(left, len(found.labels))


def pathfinder(
    level: str = "hard",
    side: int = 32,
    *,
    sizes: Sequence[int] = (20_000, 1_000, 2_000),
    seed: int = 0,
) -> SymbolData:
    """Pathfinder, pixel by pixel: sequences of ``side``² grey levels, two labels.

    Args:
      level: "easy", "intermediate" or "hard", the length of the contours.
      side: 32, or 128 for Path-X.
      sizes: of the three parts; the paper's are 160,000, 20,000 and 20,000.
      seed: of the draw.

    Raises:
      ValueError: unknown level or side.

    >>> data = pathfinder("easy", sizes=(3, 1, 1))
    >>> data.train.inputs.shape, data.grid
    ((3, 1024), (32, 32))
    """
    if level not in LEVELS or side not in CANVASES:
        raise ValueError(
            f"level must be one of {', '.join(LEVELS)} and side one of "
            f"{', '.join(map(str, CANVASES))}, got {level!r} and {side!r}."
        )
    for size in sizes:
        check_int("sizes", size, 1)
    length, canvas, total = LEVELS[level], CANVASES[side], sum(sizes)

    def make() -> np.ndarray:
        """Of each image its pixels, and its label last."""
        random = np.random.Generator(np.random.PCG64([seed, 24]))
        rows = [
            np.concatenate(
                [
                    ink(found, canvas).reshape(len(found.labels), -1),
                    found.labels[:, None].astype(np.uint8),
                ],
                axis=1,
            )
            for found in drawings(random, total, length, canvas)
        ]
        return np.concatenate(rows)

    name = f"pathfinder{side}_{level}"
    code = inspect.getsource(sys.modules[__name__])
    made = kept(f"{name}_{total}", seal(code, f"{seed}"), make)
    ends = np.cumsum(sizes)
    parts = [
        Fold.of(np.ascontiguousarray(rows[:, :-1]), rows[:, -1])
        for rows in (made[end - n : end] for n, end in zip(sizes, ends, strict=True))
    ]
    return SymbolData.drawn(name, seed, parts, 256, 2, grid=(side, side))
