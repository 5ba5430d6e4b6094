"""Composed scenes: labels that can be read off the picture, endless and nested."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments.data import scenes
from experiments.data.images import Dataset

CLASSES, PER_CLASS, SIZE = 10, 7, 4


def make_dataset(size: int = SIZE, channels: int = 1) -> Dataset:
    """Plain images whose grey level tells class, split and number of the image."""
    labels = np.random.default_rng(0).permutation(np.arange(CLASSES * PER_CLASS) % 10)
    number = np.zeros_like(labels)
    for c in range(CLASSES):
        number[labels == c] = np.arange(PER_CLASS)

    def images(test: int) -> np.ndarray:
        level = (1 + test + 2 * (labels + CLASSES * number)).astype(np.uint8)
        return np.broadcast_to(
            level[:, None, None, None], (len(labels), size, size, channels)
        )

    return Dataset(
        name="plain",
        source="here",
        train_images=images(0),
        train_labels=labels.astype(np.int32),
        test_images=images(1),
        test_labels=labels.astype(np.int32),
        class_names=tuple(map(str, range(CLASSES))),
        sha256="",
    )


DATASET = make_dataset()


def read(images: np.ndarray, grid: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Class and level of the item in every cell, [n, grid, grid]; class -1 is black."""
    level = images[:, 1::SIZE, 1::SIZE, 0].astype(int)
    assert level.shape[1:] == (grid, grid)
    np.testing.assert_array_equal(
        images[..., 0], np.repeat(np.repeat(level, SIZE, 1), SIZE, 2)
    )
    return np.where(level == 0, -1, (level - 1) // 2 % CLASSES), level


def make(n: int = 300, **options: object) -> tuple[np.ndarray, np.ndarray]:
    options = {"split": "train", "task": "pointer", "item": SIZE, **options}
    return scenes.make_scenes(DATASET, n, **options)  # type: ignore[arg-type]


CLOCKWISE = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]


@pytest.mark.parametrize("classes", [None, 3, 8])
def test_pointer_label_is_what_the_centre_points_at(classes):
    images, labels = make(item_classes=classes)
    assert images.shape == (300, 12, 12, 1) and images.dtype == np.uint8
    assert labels.shape == (300,) and labels.dtype == np.int32
    shown, _ = read(images)
    places = [CLOCKWISE[k] for k in shown[:, 1, 1]]
    expected = [shown[i, y, x] for i, (y, x) in enumerate(places)]
    assert labels.tolist() == expected
    assert set(labels) == set(range(classes or 10))
    assert set(shown[:, 1, 1]) == set(range(8))


def test_match_label_is_the_only_cell_with_the_class_of_the_centre():
    images, labels = make(task="match", item_classes=9)
    shown, level = read(images)
    rim = np.stack([shown[:, y, x] for y, x in CLOCKWISE], axis=1)
    same = rim == shown[:, 1, 1][:, None]
    assert (same.sum(1) == 1).all()
    assert labels.tolist() == same.argmax(1).tolist()
    assert set(labels) == set(range(8)) and rim.max() == 8
    # Never the very same image twice, or pixels would do for classes.
    there = np.stack([level[:, y, x] for y, x in CLOCKWISE], axis=1)
    assert (there[same] != level[:, 1, 1]).all()


@pytest.mark.parametrize(("cells", "classes"), [(8, 10), (8, 3), (4, 2), (5, 5)])
def test_every_class_is_on_the_rim_as_often_as_any_other(cells, classes):
    images, _ = make(cells=cells, item_classes=classes)
    shown, _ = read(images)
    shown[:, 1, 1] = -1
    counts = (shown[..., None] == np.arange(classes)).sum((1, 2))
    assert (counts.sum(1) == cells).all()
    assert counts.max() == -(-cells // classes) and counts.min() == cells // classes


def test_fewer_cells_are_spread_and_the_others_black():
    shown, _ = read(make(cells=4)[0])
    used = {(y, x) for y, x in np.argwhere((shown >= 0).all(0)).tolist()}
    assert used == {(1, 1), (0, 0), (0, 2), (2, 2), (2, 0)}
    assert (shown[:, [0, 1, 1, 2], [1, 0, 2, 1]] == -1).all()
    # On a wide grid the items stand on the outermost ring, far from the centre.
    images, labels = make(cells=8, grid=5, task="match")
    shown, _ = read(images, grid=5)
    used = {(y, x) for y, x in np.argwhere((shown >= 0).all(0)).tolist()}
    ring = [(0, 0), (0, 2), (0, 4), (2, 4), (4, 4), (4, 2), (4, 0), (2, 0)]
    assert used == {(2, 2), *ring}
    assert all(
        shown[i][ring[label]] == shown[i, 2, 2] for i, label in enumerate(labels)
    )
    assert (read(make(cells=8, grid=5)[0], grid=5)[0] >= 0).sum(0).max() == 300


def test_inner_rings_come_last():
    images, labels = make(cells=10, grid=5)
    shown, _ = read(images, grid=5)
    assert (shown[:, 1:4, 1:4] >= 0).sum() == 300  # the centre only
    assert scenes._rim(5)[16:] == [(y + 1, x + 1) for y, x in CLOCKWISE]
    assert len(set(scenes._rim(7))) == 48
    assert set(labels) == set(range(10))


def test_scenes_nest_and_do_not_depend_on_how_they_are_cut():
    images, labels = make(60)
    part, part_labels = make(20, start=30)
    np.testing.assert_array_equal(part, images[30:50])
    np.testing.assert_array_equal(part_labels, labels[30:50])
    np.testing.assert_array_equal(make(1)[0], images[:1])
    far, _ = make(3, start=2**40)
    assert not any((far[0] == image).all() for image in images)
    assert len(np.unique(images.reshape(60, -1), axis=0)) == 60


def test_seeds_and_splits_differ():
    train, train_labels = make(200)
    other, other_labels = make(200, seed=1)
    test, test_labels = make(200, split="test")
    assert (train_labels == other_labels).mean() < 0.3
    assert (train_labels == test_labels).mean() < 0.3
    assert not (train == other).all((1, 2, 3)).any()
    # Odd levels are training images, even ones test images.
    assert (train[train > 0] % 2 == 1).all() and (test[test > 0] % 2 == 0).all()
    # Neighbouring seeds must not be shifted copies of one another.
    assert not (train[1:] == other[:-1]).all((1, 2, 3)).any()


def test_random_draws_are_even_and_independent():
    n = 20_000
    random = scenes._Random(0, "train", 0, n)
    draws = random.below(scenes._TARGET, 8)
    tolerance = 5 * np.sqrt(n / 8)  # five standard deviations
    assert np.abs(np.bincount(draws, minlength=8) - n / 8).max() < tolerance
    for other in (
        random.below(scenes._TARGET + 1, 8),
        scenes._Random(1, "train", 0, n).below(scenes._TARGET, 8),
        scenes._Random(0, "test", 0, n).below(scenes._TARGET, 8),
        np.roll(draws, 1),
    ):
        table = np.bincount(draws * 8 + other, minlength=64)
        assert np.abs(table - n / 64).max() < 5 * np.sqrt(n / 64)
    order = random.shuffles(scenes._PERMUTE, 3) @ [9, 3, 1]
    counts = np.unique(order, return_counts=True)[1]
    assert len(counts) == 6
    assert np.abs(counts - n / 6).max() < 5 * np.sqrt(n / 6)


def test_scenes_stay_the_same_for_ever():
    # Stored results depend on it: a change must be meant.
    assert make(12)[1].tolist() == [9, 0, 5, 7, 3, 9, 8, 4, 7, 2, 5, 7]
    assert make(12, task="match", split="test", seed=3)[1].tolist() == [
        5,
        7,
        2,
        0,
        7,
        1,
        1,
        7,
        2,
        7,
        3,
        1,
    ]
    assert int(make(12)[0].astype(int).sum()) == 115424


def test_chance_level_is_what_the_best_reader_of_the_rim_alone_gets():
    for cells, classes in ((8, 3), (8, 10), (4, 2)):
        images, labels = make(4000, cells=cells, item_classes=classes)
        shown, _ = read(images)
        shown[:, 1, 1] = -1
        counts = (shown[..., None] == np.arange(classes)).sum((1, 2))
        expected = counts[np.arange(4000), labels].mean() / cells  # random cell
        best = (counts.argmax(1) == labels).mean()  # most frequent class
        chance = scenes.chance_level("pointer", cells=cells, item_classes=classes)
        assert abs(best - chance) < 0.04 and expected <= chance + 1e-9
        majority = np.bincount(labels).max() / 4000
        assert majority < chance + 0.04
    assert scenes.chance_level("match", cells=5, item_classes=9) == 1 / 5
    _, labels = make(4000, task="match", cells=5)
    assert abs(np.bincount(labels).max() / 4000 - 1 / 5) < 0.03


def test_resize_is_exact_area_averaging():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 28, 28, 3), np.uint8)
    small = scenes.resize(images, 14)
    blocks = images.reshape(5, 14, 2, 14, 2, 3).astype(int).sum((2, 4))
    np.testing.assert_array_equal(small, (blocks + 2) // 4)
    # Any ratio: enlarge to a common multiple, then average blocks.
    big = images.repeat(3, 1).repeat(3, 2).astype(int)  # 84 = 12 * 7
    sums = big.reshape(5, 12, 7, 12, 7, 3).sum((2, 4))
    np.testing.assert_array_equal(scenes.resize(images, 12), (2 * sums + 49) // 98)
    np.testing.assert_array_equal(
        scenes.resize(images, 56), images.repeat(2, 1).repeat(2, 2)
    )
    assert scenes.resize(images, 28) is images
    wide = np.full((1, 3, 9, 1), 200, np.uint8)
    assert (scenes.resize(wide, 4) == 200).all()


def test_colour_and_resizing_inside_scenes():
    dataset = make_dataset(size=8, channels=3)
    images, labels = scenes.make_scenes(
        dataset, 40, split="train", task="pointer", item=SIZE
    )
    plain, plain_labels = make(40)
    assert images.shape == (40, 12, 12, 3)
    np.testing.assert_array_equal(images, np.broadcast_to(plain, images.shape))
    np.testing.assert_array_equal(labels, plain_labels)


def test_span_and_num_labels():
    assert scenes.span(grid=5, item=8, cells=4) == 24
    assert scenes.num_labels("pointer", cells=4, item_classes=6) == 6
    assert scenes.num_labels("match", cells=4, item_classes=6) == 4
    with pytest.raises(ValueError, match=r"cells must be in 1\.\.8, got 9"):
        scenes.span(grid=3, item=8, cells=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sort"}, "task must be one of"),
        ({"split": "val"}, "split must be one of"),
        ({"grid": 4}, "grid must be odd"),
        ({"grid": 1}, "grid must be at least 3"),
        ({"cells": 9}, "a grid of 3x3 has 8 cells besides the centre"),
        ({"cells": 1}, "cells must be at least 2"),
        ({"cells": 11, "grid": 5}, "names the cell, and plain has 10 classes"),
        ({"item_classes": 11}, "item_classes=11 is too many: plain has 10"),
        ({"item_classes": 1}, "item_classes must be at least 2"),
        ({"task": "match", "item_classes": 7}, "all rim items must differ in class"),
        ({"n": 0}, "n must be at least 1"),
        ({"start": -1}, "start must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"item": 0}, "item must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"n": 5, **options})


@pytest.mark.parametrize("name", ["n", "grid", "item", "cells", "seed", "start"])
def test_options_must_be_integers(name):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 3.0"):
        make(**{"n": 5, name: 3.0})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got True"):
        make(**{"n": 5, name: True})


@pytest.mark.parametrize("absent", [2, 9])
def test_class_without_images(absent):
    keep = DATASET.test_labels != absent
    bare = dataclasses.replace(
        DATASET,
        test_images=DATASET.test_images[keep],
        test_labels=DATASET.test_labels[keep],
    )
    with pytest.raises(ValueError, match=f"test split has no image of class {absent}"):
        scenes.make_scenes(bare, 20, split="test", task="pointer", item=SIZE)
