"""Tasks of symbols: each held against its definition, told once more, slowly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments.data import images, listops, pathfinder, recall
from experiments.data.sequences import IGNORED
from experiments.data.symbols import Fold, SymbolData

SIZES = (60, 5, 7)


def real(fold, i):
    """(symbols, labels) of a sequence, without padding."""
    length = fold.lengths[i]
    return fold.inputs[i, :length].tolist(), fold.labels[i, :length].tolist()


def test_recall_asks_each_key_once_for_its_value():
    data = recall.recall((1, 3, 5), keys=6, sizes=SIZES, seed=3)
    assert data.each and data.symbols == 12 and data.classes == 6
    for i in range(60):
        x, y = real(data.train, i)
        n = data.train.groups[i]
        assert n == (1, 3, 5)[i % 3] and len(x) == 3 * n
        told = dict(zip(x[: 2 * n : 2], x[1 : 2 * n : 2], strict=True))
        assert len(told) == n and max(told) < 6 <= min(told.values())
        assert sorted(x[2 * n :]) == sorted(told)
        assert y[: 2 * n] == [IGNORED] * (2 * n)
        assert [told[key] - 6 for key in x[2 * n :]] == y[2 * n :]
    assert (data.train.labels[0, 3:] == IGNORED).all()
    with pytest.raises(ValueError, match="pairs must be 1 to keys=6 each, got"):
        recall.recall((7,), keys=6)


def test_copying_tells_the_data_in_order():
    data = recall.copying(20, data=4, kinds=5, sizes=SIZES)
    for i in range(60):
        x, y = real(data.train, i)
        assert [s for s in x[:-4] if s < 5] == y[-4:] and x[-4:] == [6] * 4
        assert y[:-4] == [IGNORED] * 16
    with pytest.raises(ValueError, match="length must be at least"):
        recall.copying(7, data=4)


def test_induction_tells_what_followed_the_mark():
    data = recall.induction(6, kinds=4, sizes=(400, 5, 7))
    places = set()
    for i in range(400):
        x, y = real(data.train, i)
        assert x.count(4) == 2 and x[-1] == 4 and y[:-1] == [IGNORED] * 5
        assert x[x.index(4) + 1] == y[-1]
        places.add(x.index(4))
    assert places == {0, 1, 2, 3}


def worked_out(tokens):
    """What a list comes to, by recursion over its words."""
    word = tokens.pop(0)
    if word.isdigit():
        return int(word)
    args = []
    while tokens[0] != "]":
        args.append(worked_out(tokens))
    tokens.pop(0)
    args.sort()
    n = len(args)
    of_both = (args[n // 2] + args[~(n // 2)]) // 2
    return {
        "[MIN": args[0], "[MAX": args[-1], "[MED": of_both, "[SM": sum(args) % 10,
    }[word]  # fmt: skip


def words(fold, i):
    return [listops.TOKENS[x] for x in fold.inputs[i, : fold.lengths[i]]]


def test_lists_come_to_their_labels():
    data = listops.listops(20, 200, sizes=(300, 50, 60), seed=1)
    assert data.classes == 10 and data.symbols == 15 and data.length == 199
    for fold in (data.train, data.validation, data.test):
        for i, label in enumerate(fold.labels):
            tokens = words(fold, i)
            assert worked_out(tokens) == label and not tokens
        assert fold.lengths.min() > 20 and fold.lengths.max() < 200
    rows = np.concatenate([data.train.inputs, data.validation.inputs, data.test.inputs])
    assert len(np.unique(rows, axis=0)) == 410
    with pytest.raises(ValueError, match="least and most must be 3 or more"):
        listops.listops(5, 6, sizes=(1, 1, 1))


def test_lists_are_drawn_by_the_rule_of_the_paper():
    random = np.random.default_rng(0)
    levels, sizes = listops.grow(random, 20_000, 10**9)
    size = 1.0  # of an argument of the deepest level, then of those above, on average
    for _ in range(8):
        size = 0.75 + 0.25 * (2 + 6 * size)
    error = sizes.std() / np.sqrt(len(sizes))
    assert sizes.mean() == pytest.approx(2 + 6 * size, abs=4 * error)
    assert len(levels) == 10 and not levels[-1].args.any()
    below = levels[1]
    assert (below.args > 0).mean() == pytest.approx(0.25, abs=0.01)
    args = levels[0].args
    assert args.min() == 2 and args.max() == 10
    kinds = np.bincount(levels[0].value - listops.FIRST) / 20_000
    assert kinds == pytest.approx([0.25] * 4, abs=0.02)


def joined(dashes, gap):
    """Which dashes hang together, by flooding from one to those that begin nearby."""
    ends = dashes[:, None, :, None], dashes[None, :, None, :]
    near = np.sqrt(((ends[0] - ends[1]) ** 2).sum(-1)).min(axis=(2, 3)) < 1.05 * gap
    found = np.arange(len(dashes))
    for _ in dashes:
        found = np.where(near, found[None], len(dashes)).min(axis=1)
    return found


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_discs_lie_on_one_contour_where_the_label_says_so(level):
    canvas, length = pathfinder.CANVASES[32], pathfinder.LEVELS[level]
    found = pathfinder.draw(np.random.default_rng(0), 80, length, canvas)
    assert len(found.labels) > 15 and 0.2 < found.labels.mean() < 0.8
    for dashes, discs, label in zip(*found, strict=True):
        real = dashes[:, 0, 0] < pathfinder.FAR / 2
        dashes = dashes[real]
        sizes = np.sqrt(((dashes[:, 1] - dashes[:, 0]) ** 2).sum(-1))
        assert np.allclose(sizes, canvas.dash, atol=1e-4)
        assert dashes.min() > 1 and dashes.max() < 30
        at = [np.abs(dashes - d).sum(-1).min(axis=1).argmin() for d in discs]
        contour = joined(dashes, canvas.gap)
        assert (contour[at[0]] == contour[at[1]]) == label
        for disc in at:  # at the end of a long contour, of which there are two
            assert (contour == contour[disc]).sum() == length
        assert (np.bincount(contour) == length).sum() >= 2


def test_ink_is_where_dashes_and_discs_are():
    canvas = pathfinder.CANVASES[32]
    dashes = np.array([[[[10.0, 10.0], [10.0, 12.0]], [[1e6, 1e6]] * 2]])
    discs = np.array([[[20.0, 20.0], [5.0, 25.0]]])
    (image,) = pathfinder.ink(
        pathfinder.Drawing(dashes, discs, np.zeros(1, int)), canvas
    )
    assert image[10, 10:13].tolist() == [191] * 3 and not image[8].any()
    assert image[20, 20] == image[5, 25] == 255 and image[20, 21] == 255
    assert (image > 0).sum() == 3 + 2 * 9


@pytest.mark.parametrize(("level", "least"), [("easy", 0.94), ("hard", 0.82)])
def test_flooding_the_ink_finds_what_is_joined(level, least):
    canvas, length = pathfinder.CANVASES[32], pathfinder.LEVELS[level]
    found = pathfinder.draw(np.random.default_rng(1), 120, length, canvas)
    told = pathfinder.joined(pathfinder.ink(found, canvas))
    assert (told == found.labels).mean() > least
    assert told[found.labels == 1].mean() > 0.95


def test_images_are_told_in_rows_and_levels_are_three():
    data = pathfinder.pathfinder("easy", sizes=(6, 2, 2))
    assert data.train.inputs.shape == (6, 1024) and data.grid == (32, 32)
    assert data.train.inputs.max() == 255 and data.name == "pathfinder32_easy"
    with pytest.raises(ValueError, match="level must be one of easy"):
        pathfinder.pathfinder("harder")
    crowded = pathfinder.Canvas(side=12)
    with pytest.raises(ValueError, match="length must leave room"):
        next(pathfinder.drawings(np.random.default_rng(0), 1, 60, crowded))


def test_images_are_read_row_by_row_in_grey(dataset):
    data = images.pixels(dataset, (60, 30, 12))
    assert data.grid == (8, 8) and data.classes == 3 and data.name == "image_toy"
    seen = np.concatenate([data.train.inputs, data.validation.inputs])
    known = {bytes(x): y for x, y in zip(dataset.train_images, dataset.train_labels)}  # noqa: B905
    labels = np.concatenate([data.train.labels, data.validation.labels])
    assert [known[bytes(x)] for x in seen] == labels.tolist()
    assert np.bincount(data.test.labels).tolist() == [4, 4, 4]
    red = dataclasses.replace(
        dataset,
        train_images=np.repeat(dataset.train_images, 3, axis=-1) * np.uint8([1, 0, 0]),
        test_images=np.repeat(dataset.test_images, 3, axis=-1),
    )
    grey = images.pixels(red, (60, 30, 12))
    assert (grey.train.inputs == np.rint(0.299 * data.train.inputs)).all()
    assert (grey.test.inputs == data.test.inputs).all()


def test_what_is_drawn_follows_from_the_seed():
    one, two, other = (recall.recall((2,), sizes=SIZES, seed=s) for s in (0, 0, 1))
    assert one.sha256 == two.sha256 != other.sha256
    assert "60 train + 5 validation + 7 test sequences of 6 symbols" in one.describe()


def test_data_that_do_not_fit_are_told():
    good = Fold.of(np.zeros((2, 3), np.uint8), np.array([0, 1]))
    for part, said in (
        (
            good._replace(inputs=good.inputs + 5),
            r"train.inputs must be below symbols=2",
        ),
        (good._replace(labels=good.labels + 5), r"train.labels must be in 0 … 1"),
        (good.take(slice(0)), "train must hold a sequence"),
    ):
        with pytest.raises(ValueError, match=said):
            SymbolData("t", "here", "0", 2, 2, part, good, good)
