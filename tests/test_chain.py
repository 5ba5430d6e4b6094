"""`chain_length` against chains that can be counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import attn_jax
from attn_jax.nn.recurrent import LstmLayer
from attn_jax.tools.chain import Chain, chain_length


def _struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


X = _struct(16)


@pytest.mark.parametrize(
    ("fn", "operations", "rounds"),
    [
        (lambda x: jnp.exp(x) + jnp.tanh(jnp.exp(x)), 3, 3),
        (lambda x: (x + 1.0) @ x, 2, 1 + 1 + 4),
        (lambda x: jnp.cumsum(x)[::-1].reshape(4, 4), 1, 4),
        (lambda x: jnp.where(jnp.arange(16) < 3, x, 0.0), 0, 0),
        (lambda x: jax.lax.cond(x[0] > 1.0, jnp.exp, lambda x: x * x + x, x), 2, 2),
        (lambda x: jax.jit(jax.checkpoint(lambda x: x.max() - 1.0))(x), 2, 5),
    ],
    ids=["parallel", "product", "cumsum", "moves", "cond", "calls"],
)
def test_a_chain_is_the_longest_path(fn, operations, rounds):
    assert chain_length(fn, X) == Chain(operations, rounds)


def test_what_no_output_needs_is_not_in_the_chain():
    assert chain_length(lambda x: (jnp.tanh(jnp.exp(x)), x + 1.0)[1], X).operations == 1


def test_a_scan_counts_what_a_turn_hands_to_the_next():
    def two(x):  # a path of 1 and one of 2 operations, which cross each turn
        def turn(carry, new):
            a, b = carry
            return (b + new, jnp.exp(a + new)), jnp.exp(a)

        return jax.lax.scan(turn, (x[0], x[0]), x)

    # The slow path from a to b takes 2, back from b to a takes 1: 3 for two turns.
    assert chain_length(two, X).operations == 8 * 3
    reverse = lambda x: jax.lax.scan(lambda c, x: (c * x, None), x[0], x, reverse=True)  # noqa: E731
    assert chain_length(reverse, X).operations == 16


def test_turns_that_hand_on_nothing_run_side_by_side():
    def blocks(x):
        def turn(i, out):
            return jax.lax.dynamic_update_index_in_dim(out, jnp.exp(x[i] + 1.0), i, 0)

        return jax.lax.fori_loop(0, 16, turn, jnp.zeros_like(x))

    assert chain_length(blocks, X) == Chain(2, 2)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def until(x):
        return jax.lax.while_loop(lambda x: x[0] < 9.0, lambda x: 2.0 * (x + x), x)

    assert chain_length(until, X) == Chain(2, 2, exact=False)
    assert chain_length(lambda x: x.at[jnp.array([1, 1])].add(x[:2]), X) == Chain(1, 1)
    assert not chain_length(jnp.linalg.cholesky, _struct(3, 3)).exact


def test_attention_waits_for_a_fixed_chain_and_a_recurrent_network_for_every_token():
    def attention(length):
        fn = lambda x: attn_jax.dot_product(x, x, x, is_causal=True)  # noqa: E731
        return chain_length(fn, _struct(length, 4))

    layer = LstmLayer(4, 5, rngs=nnx.Rngs(0))
    lstm = lambda n: chain_length(layer, _struct(1, n, 4)).operations  # noqa: E731
    short, long = attention(32), attention(64)
    assert short.operations == long.operations < 12
    assert long.rounds == short.rounds + 3  # the top, the sum and the mean of values
    # Of a token: product, two sums, then the gates' way to the output.
    assert lstm(64) - lstm(32) == 32 * (lstm(2) - lstm(1)) > 32 * 4
    gradient = jax.grad(lambda x: layer(x).sum())
    back = [chain_length(gradient, _struct(1, n, 4)).operations for n in (16, 32, 48)]
    assert back[2] - back[1] == back[1] - back[0] > 16 * 8
