"""`count_flops` against counts that are known from the shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import attn_jax
from attn_jax.tools.cost import Flops, count_flops


def _struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


A, B = _struct(3, 4), _struct(4, 5)


def test_matrix_product_is_exact():
    assert count_flops(jnp.matmul, A, B) == Flops(2 * 3 * 4 * 5, 0)


def test_batched_product_and_vmap_count_alike():
    q, k = _struct(6, 7, 8), _struct(6, 9, 8)
    expected = Flops(6 * 2 * 7 * 9 * 8, 0)
    assert count_flops(lambda q, k: jnp.einsum("bth,bsh->bts", q, k), q, k) == expected
    assert count_flops(jax.vmap(lambda q, k: q @ k.T), q, k) == expected


def test_scan_multiplies_by_its_length():
    def looped(a, xs):
        return jax.lax.scan(lambda c, x: (c, c @ x), a, xs)

    assert count_flops(looped, A, _struct(11, 4, 5)).products == 11 * 120


def test_lax_map_counts_as_vmap_does():
    x = _struct(6, 7, 8)
    one = lambda x: jax.nn.relu(x @ x.T)  # noqa: E731
    looped = count_flops(lambda x: jax.lax.map(one, x), x)
    assert looped == count_flops(jax.vmap(one), x)
    assert looped == Flops(6 * 2 * 7 * 7 * 8, 6 * 7 * 7)


def test_nested_loops_and_fori_loop():
    def nested(x):
        def outer(i, x):
            return jax.lax.fori_loop(0, 3, lambda j, x: jnp.tanh(x), x)

        return jax.lax.fori_loop(0, 5, outer, x)

    assert count_flops(nested, _struct(7)) == Flops(0, 15 * 7)


def test_while_loop_counts_once_and_says_so():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x * 2.0, x)

    assert count_flops(until, _struct(7)) == Flops(0, 7 + 7, exact=False)
    halting = count_flops(
        lambda n, x: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x),
        _struct(dtype=jnp.int32),
        _struct(4, 4),
    )
    assert halting.products == 2 * 4**3 and not halting.exact


def test_cond_takes_the_dearest_branch():
    def either(flag, a, b):
        return jax.lax.cond(flag, lambda: a @ b, lambda: jnp.zeros((3, 5)))

    assert count_flops(either, _struct(dtype=jnp.bool_), A, B) == Flops(120, 0)


def test_moving_selecting_and_integers_are_free():
    def free(x):
        big = jnp.where(x > 0, x, 0.0).T.reshape(-1).astype(jnp.bfloat16)
        return jnp.concatenate([big, big])[jnp.arange(4) * 2]

    assert count_flops(free, _struct(3, 4)).total == 0


def test_reductions_count_their_input():
    assert count_flops(lambda x: x.sum(axis=1), _struct(3, 4)) == Flops(0, 12)
    assert count_flops(lambda x: jnp.cumsum(x, axis=1), _struct(3, 4)) == Flops(0, 12)
    adds = count_flops(lambda x, u: x.at[jnp.arange(5)].add(u), _struct(9), _struct(5))
    assert adds == Flops(0, 5)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    counted = count_flops(conv, _struct(2, 8, 8, 4), _struct(3, 3, 4 // groups, 6))
    assert counted == Flops(2 * (2 * 8 * 8 * 6) * (3 * 3 * 4 // groups), 0)


def test_the_gradient_of_a_convolution_costs_it_twice():
    # 8 by 8 outputs; the padded input's gradient, of a kernel of one, reads no padding.
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        ).sum()

    x, kernel = _struct(3, 15, 15, 4), _struct(1, 1, 2, 6)
    once = 2 * (3 * 8 * 8 * 6) * 2
    assert count_flops(conv, x, kernel).products == once
    of_kernel = count_flops(jax.grad(conv, 1), x, kernel).products
    assert of_kernel == 2 * once
    # 15 and not 16 places a side, of which a quarter is no zero of the dilation.
    of_input = count_flops(jax.grad(conv, 0), x, kernel).products
    assert of_input == once + 2 * (3 * 15 * 15 * 4) * 3 // 4


def test_pooling_counts_its_windows():
    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (3, 3), (2, 2), "VALID")

    assert count_flops(pool, _struct(9, 9)) == Flops(0, 4 * 4 * 9)


def test_what_cannot_be_seen_is_not_exact():
    def called(x):
        return jax.pure_callback(lambda x: x, x, x)

    assert count_flops(called, _struct(3, 4)) == Flops(0, 0, exact=False)


def test_a_linear_solve_counts_once():
    solve = count_flops(jnp.linalg.solve, _struct(6, 6), _struct(6, 2)).products
    assert solve == int(2 / 3 * 6**3) + 2 * 6**2 * 2


def test_fft():
    assert count_flops(jnp.fft.fft, _struct(3, 8)).products == 3 * 5 * 8 * 3
    assert count_flops(jnp.fft.rfft, _struct(3, 8)).products == 3 * 5 * 8 * 3
    spectrum = _struct(3, 5, dtype=jnp.complex64)
    assert count_flops(jnp.fft.irfft, spectrum).products == 3 * 5 * 8 * 3


def test_a_gradient_counts_what_is_recomputed():
    def square(a, b):
        return (a @ b).sum()

    plain = count_flops(jax.grad(square, (0, 1)), A, B).products
    assert plain == 3 * 120
    again = count_flops(jax.grad(jax.checkpoint(square), (0, 1)), A, B).products
    assert again >= plain


def test_custom_rules_are_entered():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(
        lambda a, b: (a @ b, (a, b)),
        lambda kept, g: (g @ kept[1].T, kept[0].T @ g),
    )
    assert count_flops(product, A, B).products == 120
    both = jax.grad(lambda a, b: product(a, b).sum(), (0, 1))
    assert count_flops(both, A, B).products == 360


def test_loops_over_heads_and_blocks_do_not_hide_work():
    """What XLA's own count gets wrong, as it takes a loop's body once."""
    heads, length, size = 3, 1024, 16
    x = _struct(1, length, heads, size)

    def run(implementation):
        return lambda q, k, v: attn_jax.dot_product_attention(
            q, k, v, implementation=implementation
        )

    products = 2 * 2 * heads * length**2 * size
    dense = count_flops(run("reference"), x, x, x)
    assert dense.products == products
    block = count_flops(run("blockwise"), x, x, x)
    assert block.products == products and block.exact
    xla = jax.jit(run("blockwise")).lower(x, x, x).compile().cost_analysis()
    assert xla["flops"] < 0.7 * block.total
