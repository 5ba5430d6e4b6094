"""Labelled sequences, their batches and tasks."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from experiments.data import sequence_tasks, sequences, text
from experiments.data.sequences import IGNORED, Batches, Part, SequenceData


def part(lengths, seed=0):
    rng = np.random.default_rng(seed)
    inputs = [
        np.full((n, 2), i + 1, np.int32) for i, n in enumerate(lengths)
    ]  # numbered, to be told apart in a batch
    return Part(
        inputs,
        [rng.integers(0, 3, n).astype(np.int32) for n in lengths],
        {"odd": [np.arange(n) % 2 == 1 for n in lengths]},
    )


def test_an_epoch_takes_every_sequence_once_padded_to_its_bucket():
    lengths = [3, 8, 9, 1, 16, 7] * 5
    whole = part(lengths)
    batches = Batches(whole, (8, 16), tokens=128, seed=3)
    assert batches.per_epoch == 4  # 20 in 16 rows of 8 each, 10 in 8 rows of 16
    for epoch in (0, 1):
        seen: collections.Counter[int] = collections.Counter()
        for step in range(4 * epoch, 4 * epoch + 4):
            x, y = batches[step]
            assert x.shape[:2] in {(16, 8), (8, 16)}
            assert y.shape == x.shape[:2]
            for row, labels in zip(x, y, strict=True):
                size = int((labels != IGNORED).sum())
                if size:
                    number = row[0, 0] - 1
                    assert (labels[:size] == whole.labels[number]).all()
                    assert (row[:size] == whole.inputs[number]).all()
                    seen[number] += 1
                assert not row[size:].any()
        assert seen == dict.fromkeys(range(30), 1)


def test_the_order_depends_on_seed_and_step_alone():
    whole = part([4, 9, 2, 12] * 8)
    one, two = (Batches(whole, (8, 16), 64, seed=5) for _ in range(2))
    later = [two[step] for step in (7, 2)]  # asked for in another order
    for batch, step in zip(later, (7, 2), strict=True):
        np.testing.assert_array_equal(batch.inputs, one[step].inputs)
    other = Batches(whole, (8, 16), 64, seed=6)
    assert any(
        one[step].inputs.shape != other[step].inputs.shape
        or (one[step].inputs != other[step].inputs).any()
        for step in range(3)
    )


def test_evaluation_finds_every_sequence_at_its_place():
    whole = part([4, 9, 2, 12, 8])
    found = {}
    for indices, batch in sequences.in_order(whole, (8, 16), 64):
        for row, index in enumerate(indices):
            found[int(index)] = batch.labels[row][batch.labels[row] != IGNORED]
    assert sorted(found) == list(range(5))
    assert all((found[i] == whole.labels[i]).all() for i in found)


def test_crops_keep_every_vector_label_and_group():
    whole = part([5, 2])
    pieces = sequences.crops(whole, 2)
    assert pieces.lengths.tolist() == [2, 2, 1, 2]
    for name in ("inputs", "labels"):
        np.testing.assert_array_equal(
            np.concatenate(getattr(pieces, name)), np.concatenate(getattr(whole, name))
        )
    assert pieces.groups["odd"][1].tolist() == [False, True]


def test_wrong_sequences_are_named():
    with pytest.raises(ValueError, match=r"inputs\[1\] is an empty sequence"):
        part([3, 0])
    with pytest.raises(ValueError, match=r"labels\[0\] \[T\], got shapes \(3, 2\)"):
        Part([np.zeros((3, 2), np.int32)], [np.zeros(2, np.int32)])
    with pytest.raises(ValueError, match="one array a sequence, got 0 for 1"):
        Part([np.zeros((3, 2), np.int32)], [])
    with pytest.raises(ValueError, match="sequence 1 has 17 vectors, .* most 16"):
        Batches(part([3, 17]), (8, 16), 64, seed=0)
    none = Part([], [])
    bad = Part([np.zeros((1, 1), np.int32)], [np.array([7], np.int32)])
    with pytest.raises(ValueError, match=r"test.labels\[0\] must be in 0..1, got 7"):
        SequenceData("t", "s", "0", (3,), ("a", "b"), none, none, bad, (8,))
    with pytest.raises(ValueError, match="task must be one of pos, .*, got 'verbs'"):
        sequence_tasks.load_task("verbs")


def test_words_of_a_tagging_task_are_told_apart_as_training_knows_them():
    data = sequence_tasks.load_task("toy_pos")
    assert set(data.class_names) <= set(text.UNIVERSAL_TAGS)
    assert max(map(len, data.test.labels)) <= data.max_length
    unknown = np.concatenate(list(data.test.groups["unknown"]))
    ambiguous = np.concatenate(list(data.test.groups["ambiguous"]))
    assert ambiguous.any() and not (unknown & ambiguous).any()
    found = {n: f() for n, f in sequence_tasks.tagging_baselines(data).items()}
    # What needs context is what the baseline gets wrong.
    best = found["most_frequent_tag"]
    assert best["test_accuracy_ambiguous"] < best["test_accuracy"]
    assert found["majority"]["test_accuracy"] < best["test_accuracy"]


def test_phones_are_pieces_of_utterances_with_normalised_features():
    data = sequence_tasks.load_task("toy_phones")
    assert data.inputs == 120 and data.max_length == sequence_tasks.CROP
    frames = np.concatenate(list(data.train.inputs))
    assert np.abs(frames.mean(0)).max() < 1e-3
    assert np.abs(frames.std(0) - 1).max() < 1e-2
    assert data.train.lengths.max() <= sequence_tasks.CROP


def test_the_label_of_order_is_the_symbol_two_places_before():
    data = sequence_tasks.order()
    x, y = data.test.inputs[5][:, 0], data.test.labels[5]
    assert (y[2:] == x[:-2]).all()
    assert (y[:2] == sequence_tasks.ORDER_SYMBOLS).all()
    assert data.train.lengths.max() <= 32 < data.test.lengths.max() <= 128
    groups = data.test.groups
    bins = [name for name in groups if np.concatenate(groups[name]).any()]
    assert bins == ["length_8_32", "length_33_64", "length_65_128"]
    # No fixed label does better than one of the symbols by chance.
    assert sequence_tasks.majority(data)["test_accuracy"] < 0.16
