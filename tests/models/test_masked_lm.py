"""The masked language model: what is hidden, how, and the head that restores it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.models import Labeller, MaskedLM, choose_hidden, hide
from attn_jax.models.masked_lm import Hidden, most_hidden

KEYS = jax.random.split(jax.random.key(0), 400)
LENGTH = 40


@pytest.fixture(scope="module")
def drawn():
    """400 draws from 40 tokens of which the first 30 are eligible."""
    draw = jax.jit(jax.vmap(lambda key: choose_hidden(key, jnp.arange(LENGTH) < 30)))
    return jax.tree.map(np.asarray, draw(KEYS))


def test_hidden_are_the_share_of_what_is_eligible_in_a_fixed_shape(drawn):
    assert drawn.where.shape == (400, most_hidden(LENGTH, 0.15)) == (400, 6)
    assert (drawn.asked.sum(axis=1) == 4).all()  # .15 · 30 = 4.5, to even
    assert (drawn.where[drawn.asked] < 30).all()
    assert all(len(set(row)) == 6 for row in drawn.where.tolist())


def test_every_eligible_token_is_hidden_equally_often(drawn):
    counts = np.bincount(drawn.where[drawn.asked], minlength=LENGTH)
    expected = 400 * 4 / 30
    assert np.abs(counts[:30] - expected).max() < 4.5 * expected**0.5
    assert len({tuple(row) for row in drawn.where.tolist()}) > 390


def test_a_key_draws_the_same_again_and_batched(drawn):
    again = choose_hidden(KEYS[7], jnp.arange(LENGTH) < 30)
    np.testing.assert_array_equal(again.where, drawn.where[7])
    np.testing.assert_array_equal(again.asked, drawn.asked[7])


def test_one_is_hidden_at_least_and_none_where_none_is_eligible():
    assert int(choose_hidden(KEYS[0], jnp.arange(9) < 2).asked.sum()) == 1
    assert int(choose_hidden(KEYS[0], jnp.zeros(9, bool)).asked.sum()) == 0


def test_words_are_hidden_whole_or_not_at_all():
    words = jnp.asarray(np.repeat(np.arange(16), [1, 2, 3, 2] * 4))
    draw = jax.jit(jax.vmap(lambda k: choose_hidden(k, words >= 0, words=words)))
    found = jax.tree.map(np.asarray, draw(KEYS))
    sizes = np.bincount(np.asarray(words))
    counts = set()
    for where, asked in zip(*found, strict=True):
        whole = np.bincount(np.asarray(words)[where[asked]], minlength=16)
        assert np.isin(whole, (0, *sizes)).all() and (whole <= sizes).all()
        assert (whole[whole > 0] == sizes[whole > 0]).all()
        counts.add(int(asked.sum()))
    assert min(counts) >= 1 and max(counts) == most_hidden(32, 0.15) == 5


def test_a_word_of_more_pieces_than_are_hidden_never_is():
    words = jnp.asarray([0] * 6 + [1] * 2 + [2] * 6 + [3] * 6)  # 3 of 20 are hidden
    draw = jax.jit(jax.vmap(lambda k: choose_hidden(k, words >= 0, words=words)))
    found = jax.tree.map(np.asarray, draw(KEYS[:50]))
    assert found.asked.tolist() == [[True, True, False]] * 50
    assert {tuple(sorted(row[:2])) for row in found.where.tolist()} == {(6, 7)}
    none = choose_hidden(KEYS[0], words != 1, words=words)
    assert not none.asked.any()


def test_of_ten_hidden_eight_are_the_mask_one_another_word_and_one_itself():
    length = 4_000
    ids = jnp.stack([jnp.full(length, 50), jnp.full(length, 5)], axis=-1)
    hidden = choose_hidden(KEYS[1], jnp.ones(length, bool), 0.5)
    words = jnp.asarray([[1, 2], [3, 4]])
    seen = hide(KEYS[2], ids, hidden, jnp.asarray([99, 0]), words)
    at = np.asarray(seen)[np.asarray(hidden.where)]
    shares = {word: np.mean((at == word).all(axis=1)) for word in [(99, 0), (50, 5)]}
    assert shares[99, 0] == pytest.approx(0.8, abs=0.03)
    assert shares[50, 5] == pytest.approx(0.1, abs=0.02)
    others = at[~np.isin(at[:, 0], (99, 50))]
    assert set(map(tuple, others.tolist())) == {(1, 2), (3, 4)}
    assert int((np.asarray(seen)[:, 0] != 50).sum()) == (at[:, 0] != 50).sum()


def test_what_only_fills_up_is_not_hidden():
    hidden = Hidden(jnp.asarray([2, 0]), jnp.asarray([True, False]))
    ids = jnp.arange(3)[:, None]
    seen = hide(KEYS[0], ids, hidden, jnp.asarray([9]), ids, masked=1.0, random=0.0)
    assert seen[:, 0].tolist() == [0, 1, 9]


# ------------------------------------------------------------------- the model

SIZES, DIM, WORDS = (12, 5), 8, 10


def build(pool="mean", **more):
    tower = Labeller(
        SIZES,
        2,
        body="transformer",
        dim=DIM,
        depth=1,
        num_heads=2,
        mlp_dim=16,
        max_length=6,
        pool=pool,
        rngs=nnx.Rngs(0),
        **more,
    )
    return MaskedLM(tower, WORDS, rngs=nnx.Rngs(1), **more)


@nnx.jit
def run(model, *inputs):
    return model(*inputs)


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 6, 2)), jnp.int32)
WHERE = jnp.asarray([[0, 3], [2, 1]])
REAL = jnp.arange(6)[None] < jnp.asarray([[6], [4]])


def test_logits_are_the_formula_over_the_towers_own_table():
    model = build()
    model.bias[...] = jnp.arange(WORDS, dtype=jnp.float32)
    logits = run(model, IDS, REAL, WHERE)
    features = nnx.jit(lambda m: m.tower.features(IDS, REAL, pool=False))(model)
    x = np.asarray(features)[np.arange(2)[:, None], np.asarray(WHERE)]
    layer = model.transform
    kernel, bias = (np.asarray(x[...]) for x in (layer.kernel, layer.bias))
    x = np.asarray(jax.nn.gelu(jnp.asarray(x @ kernel + bias)))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * DIM**-0.5
    table = np.asarray(model.tower.input.embed.embedding[...])[:WORDS]
    np.testing.assert_allclose(logits, x @ table.T + np.arange(WORDS), atol=1e-5)


def test_the_table_learns_as_input_and_as_output():
    def loss(model):
        return jax.nn.logsumexp(model(IDS, REAL, WHERE), axis=-1).sum()

    grads = nnx.jit(nnx.grad(loss))(build())
    slopes = np.abs(np.asarray(grads["tower"]["input"]["embed"]["embedding"][...]))
    assert (slopes[:WORDS].max(axis=1) > 0).all()  # words that no input has
    assert slopes[WORDS : SIZES[0]].max() == 0  # the mask, which is no answer


def test_padding_changes_nothing():
    model = build()
    changed = IDS.at[1, 4:].set(3)
    np.testing.assert_array_equal(model(IDS, REAL, WHERE), model(changed, REAL, WHERE))


def test_it_says_too_whether_the_second_half_follows():
    both = nnx.jit(lambda m: m(IDS, REAL, WHERE, True))
    logits, follows = both(build())
    assert logits.shape == (2, 2, WORDS) and follows.shape == (2, 2)


def test_bfloat16_computes_in_bfloat16_and_is_near():
    low, high = build(dtype=jnp.bfloat16), build()
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote by themselves
        found = run(low, IDS, REAL, WHERE)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), run(high, IDS, REAL, WHERE), atol=0.1
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: most_hidden(4, 0.0), "`share` must be above 0"),
        (lambda: most_hidden(0, 0.5), "`length` must be at least 1"),
        (lambda: choose_hidden(KEYS[0], jnp.ones((2, 3), bool)), r"must be \[T\]"),
        (
            lambda: choose_hidden(KEYS[0], jnp.ones(3, bool), words=jnp.zeros(2, int)),
            "`words` must be",
        ),
        (
            lambda: hide(
                KEYS[0],
                IDS[0],
                Hidden(WHERE[0], WHERE[0] > 0),
                IDS[0, 0],
                IDS[0],
                masked=0.9,
                random=0.2,
            ),
            "1 at most together",
        ),
        (lambda: MaskedLM(build().tower, 13, rngs=nnx.Rngs(0)), "must be 1 to 12"),
        (lambda: build()(IDS, REAL, WHERE[0]), r"must be \[B, M\] with B=2"),
        (
            lambda: build(pool=None)(IDS, REAL, WHERE, True),
            "needs a `tower` that pools",
        ),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_tower_of_vectors_is_told():
    tower = Labeller(
        3, 2, body="window", dim=4, depth=1, mlp_dim=4, max_length=2, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="must read ids"):
        MaskedLM(tower, 2, rngs=nnx.Rngs(0))
