from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.attention_as_conv.model import AttentionImage, PositionalAttention

GRID = (4, 5)
DIM = 3
ENCODINGS = ("quadratic", "gaussian", "relative", "relative_content")


def layer(encoding="quadratic", **more):
    more = dict(num_heads=4, key_dim=2) | more
    return PositionalAttention(GRID, DIM, encoding=encoding, rngs=nnx.Rngs(0), **more)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.normal(jax.random.key(0), (2, 20, DIM))


call = nnx.jit(lambda module, *args: module(*args))


def scores_by_loops(module):
    """The table of the class's docstring, pair by pair in float64."""
    places = [(r, c) for r in range(GRID[0]) for c in range(GRID[1])]
    found = np.zeros((module.num_heads, len(places), len(places)))
    for head in range(module.num_heads):
        for t, (row, column) in enumerate(places):
            for s, (other_row, other_column) in enumerate(places):
                offset = np.array([other_row - row, other_column - column], float)
                if module.has_centres:
                    apart = offset - np.asarray(module.centre[...]).reshape(-1, 2)[head]
                    spread = np.asarray(module.spread[...], np.float64)
                    if module.encoding == "quadratic":
                        found[head, t, s] = -0.5 * spread[head] ** 2 * apart @ apart
                    else:
                        factor = spread.reshape(-1, 2, 2)[head]
                        found[head, t, s] = -0.5 * np.sum((factor.T @ apart) ** 2)
                else:
                    rows = np.asarray(module.row_table[...]).reshape(4, -1)
                    columns = np.asarray(module.column_table[...]).reshape(4, -1)
                    found[head, t, s] = rows[head, int(offset[0]) + GRID[0] - 1]
                    found[head, t, s] += columns[head, int(offset[1]) + GRID[1] - 1]
    return found


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_layer_is_its_equation(encoding, tokens):
    module = layer(encoding)
    module.bias[...] = jnp.arange(3.0)
    if module.has_centres:  # no symmetry that would hide a transposed factor
        size = module.spread[...].shape
        module.spread[...] = jax.random.normal(jax.random.key(1), size)
    scores = scores_by_loops(module)
    kernel = np.asarray(module.value[...], np.float64)
    out = np.zeros((2, 20, DIM))
    for b, x in enumerate(np.asarray(tokens, np.float64)):
        total = scores
        if module.content:
            query, key = (
                (x @ np.asarray(map_.kernel[...]) + np.asarray(map_.bias[...]))
                .reshape(20, 4, 2)
                .transpose(1, 0, 2)
                for map_ in (module.query, module.key)
            )
            total = scores + query @ key.transpose(0, 2, 1) / np.sqrt(2)
        out[b] = np.sum(softmax(total) @ x @ kernel, axis=0) + np.arange(3.0)
    np.testing.assert_allclose(call(module, tokens), out, atol=2e-5)
    weights = module.weights(tokens if module.content else None)
    if not module.content:
        np.testing.assert_allclose(weights, softmax(scores), atol=1e-5)
    assert weights.shape == ((2,) if module.content else ()) + (4, 20, 20)


def test_started_as_a_convolution_it_is_one(tokens):
    """With the border pixels repeated, as a sharp head sees the nearest token there."""
    for encoding in ("quadratic", "gaussian"):
        module = layer(encoding, num_heads=9, start="convolution", alpha=14.0)
        module.bias[...] = jnp.arange(3.0)
        kernel = module.value[...].reshape(3, 3, DIM, DIM)
        images = tokens.reshape(2, *GRID, DIM)
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        expected = jax.lax.conv_general_dilated(
            padded, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) + jnp.arange(3.0).reshape(1, 1, 1, 3)
        np.testing.assert_allclose(
            call(module, tokens), expected.reshape(2, 20, DIM), atol=1e-4
        )
        found = np.asarray(module.centres()).tolist()
        assert found == [[r, c] for r in (-1, 0, 1) for c in (-1, 0, 1)]


def test_starts_differ_in_places_alone():
    random, convolution = (layer(start=s) for s in ("random", "convolution"))
    np.testing.assert_array_equal(random.value[...], convolution.value[...])
    wide = PositionalAttention((3, 3), 2, num_heads=400, rngs=nnx.Rngs(0))
    assert abs(float(wide.centres().std()) - 2.0) < 0.2
    assert abs(float(wide.spread[...].mean()) - 1.0) < 0.01
    kernel = PositionalAttention((2, 2), 32, rngs=nnx.Rngs(0)).value[...]
    assert abs(float(kernel.std()) * np.sqrt(9 * 32 / 2) - 1) < 0.05  # He-normal


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_parameter_learns(encoding, tokens):
    graphdef, params = nnx.split(layer(encoding))
    grads = jax.jit(
        jax.grad(lambda p: jnp.sum(jnp.square(nnx.merge(graphdef, p)(tokens))))
    )(params)
    # A bias of the keys moves all scores of a query alike, which changes nothing.
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        if "'key'" not in name or "'bias'" not in name:
            assert float(jnp.abs(grad).max()) > 1e-6, name


def model(encoding="quadratic", **more):
    more = dict(dim=4, depth=2, mlp_dim=8, num_heads=4, key_dim=2) | more
    found = AttentionImage((8, 6, 2), 3, encoding=encoding, rngs=nnx.Rngs(0), **more)
    kernel = found.head.kernel[...]  # zero at first, which would hide everything
    found.head.kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    return found


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_model_and_its_maps(encoding):
    module = model(encoding)
    images = jax.random.normal(jax.random.key(0), (3, 8, 6, 2))
    logits = call(module, images)
    assert logits.shape == (3, 3)
    # One image says nothing of another.
    np.testing.assert_allclose(call(module, images[1:2]), logits[1:2], atol=1e-5)
    content = encoding == "relative_content"
    maps = module.attention_maps((1, 2), images if content else None)
    assert maps.shape == ((3,) if content else ()) + (2, 4, 4, 3)
    np.testing.assert_allclose(maps.sum((-2, -1)), 1.0, atol=1e-5)
    if content:
        assert float(jnp.abs(maps[0] - maps[1]).max()) > 1e-4
    else:
        first = module.blocks[0].attention.weights()[:, 5].reshape(4, 4, 3)
        np.testing.assert_array_equal(maps[0], first)


def test_a_head_looks_where_its_centre_is():
    module = model(start="convolution")
    maps = module.attention_maps((2, 1))
    for layer_map, centres in zip(maps, module.centres(), strict=True):
        for found, centre in zip(layer_map, centres, strict=True):
            place = np.unravel_index(int(found.argmax()), found.shape)
            assert (np.asarray(place) - (2, 1)).tolist() == centre.tolist()
    np.testing.assert_allclose(module.precisions()[0, 0], 24.0 * np.eye(2), rtol=1e-6)


def test_bfloat16_keeps_scores_in_float32():
    module = model(dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(0), (2, 8, 6, 2))
    with jax.numpy_dtype_promotion("standard"):  # Flax's normalisation
        found = call(module, images)
    assert found.dtype == jnp.bfloat16
    assert module.blocks[0].attention.scores().dtype == jnp.float32
    expected = call(model(), images)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(encoding="other"), "encoding must be one of quadratic, .*got 'other'"),
        (dict(start="other"), "start must be one of random, convolution, got 'other'"),
        (dict(encoding="relative", start="convolution"), "start must be 'random' for"),
        (dict(num_heads=5, start="convolution"), "num_heads must be a square .*got 5"),
        (dict(key_dim=0), "key_dim must be positive, got 0"),
        (dict(patch=4), "patch=4 for images of 8 x 6"),
    ],
)
def test_what_it_refuses(more, message):
    with pytest.raises(ValueError, match=message):
        model(**more)


def test_what_it_cannot_tell(tokens):
    with pytest.raises(ValueError, match="'relative' has no centres"):
        model("relative").centres()
    with pytest.raises(ValueError, match="images: attention of 'relative_content'"):
        model("relative_content").attention_maps((0, 0))
    with pytest.raises(ValueError, match="place of the 4 x 3 grid, got"):
        model().attention_maps((4, 0))
    with pytest.raises(ValueError, match="T=20 and D=3"):
        layer()(tokens[:, :19])
    with pytest.raises(ValueError, match="depend on the tokens"):
        layer("relative_content").weights()
