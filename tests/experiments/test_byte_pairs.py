"""Byte pairs: the same ones for the same text, and text that comes back."""

from __future__ import annotations

import pickle

import pytest

from experiments.data import byte_pairs

TEXTS = ["¡Sal de tu tierra!", "tierra y cielo", "el cielo, la tierra"] * 2


def test_the_same_texts_give_the_same_pieces():
    one, two = (byte_pairs.train(TEXTS, 32) for _ in range(2))
    assert one.model == two.model and len(one) == 32
    assert byte_pairs.train(TEXTS[1:], 32).pieces != one.pieces
    again = pickle.loads(pickle.dumps(one))
    assert again.pieces == one.pieces


def test_text_comes_back_and_what_is_no_text_is_left_out():
    pairs = byte_pairs.train(TEXTS, 32)
    for text, ids in zip(TEXTS, pairs.encode(TEXTS), strict=True):
        assert ids.dtype == "int32" and ids.min() > byte_pairs.UNKNOWN
        assert pairs.decode(ids) == text
        assert pairs.decode([0, *ids, 1, 2]) == text
    assert pairs.decode(pairs.encode(["  el   cielo "])[0]) == "el cielo"
    (ids,) = pairs.encode(["λ"])
    assert byte_pairs.UNKNOWN in ids and pairs.decode(ids) == ""


def test_a_size_that_the_texts_do_not_give_is_named():
    with pytest.raises(ValueError, match="size must be one that the texts .* 4000: "):
        byte_pairs.train(TEXTS, 4_000)
