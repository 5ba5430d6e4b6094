"""Several devices: local parts in `jax.shard_map`, explicit and automatic axes.

`jax.shard_map` and explicit axes say at trace time what is wrong, so a mesh without
devices will do. Whether arrays stay where they are is told by the compiled program.
"""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from attn_jax import (
    beam_search,
    dot_product_attention,
    generate,
    generate_uncached,
)
from attn_jax.attention import clusterformer_update, linear_recurrent, truncated
from attn_jax.nn.decoder import Decoder, decoder_functions
from attn_jax.nn.encoder import Encoder
from attn_jax.nn.streaming import stream
from attn_jax.positions import floater, floater_init
from attn_jax.testing import assert_conforms
from attn_jax.variant import VARIANTS, resolve, variants_with
from experiments.graphs.model import Edges, GraphEncoder
from tests import helpers

SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def sharded(fn, in_specs, out_specs=SPLIT):
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_local_parts_and_explicit_axes(name):
    assert_conforms(name, only=["shard_map", "explicit_mesh"])


@pytest.mark.parametrize("length", [64, 130])
def test_default_attention_takes_local_parts(length):
    # Queries differ from device to device, keys and a learnt bias do not: their
    # gradients are summed, which the types of `jax.shard_map` demand.
    x = jax.ShapeDtypeStruct((4, length, 2, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 2, 1, length), jnp.float32)

    def local(query, key, bias):
        out, pullback = jax.vjp(
            functools.partial(dot_product_attention, is_causal=True),
            query, key, key, bias,
        )  # fmt: skip
        return out, pullback(out)

    specs = (SPLIT, SPLIT, WHOLE, WHOLE, WHOLE)
    key = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32)
    run = sharded(local, (SPLIT, WHOLE, WHOLE), (SPLIT, specs[1:]))
    out, grads = jax.eval_shape(run, x, key, bias)
    assert out.shape == x.shape
    assert [grad.shape for grad in grads] == [x.shape, key.shape, key.shape, bias.shape]


@pytest.mark.parametrize("mixer", [*variants_with("step"), "lstm"])
def test_decoders_generate_on_local_prompts(mixer):
    if mixer == "reformer":
        mixer = resolve(mixer).bind(num_buckets=2, num_rounds=1, chunk_size=4)
    decoder = Decoder(
        7, 7, mixer=mixer, dim=8, depth=1, num_heads=2, max_length=8,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    functions, params = decoder_functions(decoder)
    prompt = jax.ShapeDtypeStruct((4, 3), jnp.int32)

    def local(params, prompt):
        cached = generate(
            params, prompt, 2, jax.random.key(0),
            step=functions.step, init=functions.init,
        )  # fmt: skip
        plain = generate_uncached(
            params, prompt, 2, jax.random.key(0), apply=functions.apply
        )
        loss = jax.grad(lambda p: jnp.sum(functions.apply(p, prompt) ** 2))
        found = beam_search(
            params, prompt, 2, step=functions.step, init=functions.init, end=0,
            num_beams=3,
        )  # fmt: skip
        return cached, plain, loss(params), found.tokens

    run = sharded(local, (WHOLE, SPLIT), (SPLIT, SPLIT, WHOLE, SPLIT))
    cached, plain, _, beams = jax.eval_shape(run, params, prompt)
    assert cached.shape == plain.shape == (4, 2) and beams.shape == (4, 3, 2)
    # And the other way round: all that differs from device to device is the key.
    keys = jax.ShapeDtypeStruct((2,), jax.random.key(0).dtype)

    def drawn(rng, prompt):
        return generate(
            params, prompt, 2, rng[0], step=functions.step, init=functions.init
        )

    run = sharded(drawn, (SPLIT, WHOLE))
    assert jax.eval_shape(run, keys, prompt).shape == (8, 2)


def test_streams_graphs_and_other_loops_take_local_parts():
    near = functools.partial(truncated, left=3, right=1)
    encoder = Encoder(1, 8, num_heads=2, mlp_dim=8, attention=near, rngs=nnx.Rngs(0))
    frames = jax.ShapeDtypeStruct((4, 5, 8), jnp.float32)
    run = sharded(jax.vmap(functools.partial(stream, encoder, chunk=2)), SPLIT)
    assert jax.eval_shape(run, frames).shape == frames.shape

    graph = GraphEncoder(2, 8, num_heads=2, mlp_dim=8, rngs=nnx.Rngs(0))
    ends = np.arange(5, dtype=np.int32)
    many = jax.vmap(lambda x: graph(x, Edges(ends, ends[::-1], None, None)))
    assert jax.eval_shape(sharded(many, SPLIT), frames).shape == frames.shape

    tokens = jax.vmap(lambda x: linear_recurrent(x, x, x))
    assert jax.eval_shape(sharded(tokens, SPLIT), frames).shape == frames.shape

    start = {"centroid": jnp.eye(2, 8)}
    update = jax.vmap(lambda x: clusterformer_update(start, x, x))
    moved = jax.eval_shape(sharded(update, SPLIT), frames)
    assert moved["centroid"].shape == (4, 2, 8)

    params = floater_init(jax.random.key(0), 8)
    codes = jax.vmap(lambda x: floater(params, 4, start=x[0]))
    assert jax.eval_shape(sharded(codes, SPLIT), frames).shape == (4, 4, 8)


# A program on 2 × 2 devices, in a process of its own: what each variant's forward and
# backward pass need to bring from one device to another.
COLLECTIVES = """
import functools, json, re
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import attn_jax
from attn_jax import as_attention_fn, dot_product_attention, multi_head, multihead
from attn_jax.testing import Trial
from attn_jax.testing.trial import joined, split_moving
from attn_jax.variant import VARIANTS

jax.config.update("jax_disable_most_optimizations", True)
# Short sequences, for which loops would be chosen all the same.
multihead._LOOP_FROM_SCORES = multihead.CPU_BLOCKWISE_FROM_SCORES = 64
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))


def shaped(leaf, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def collectives(fn, arrays):
    def both(arrays):
        moving, fixed = split_moving(arrays)
        out, pullback = jax.vjp(lambda moving: fn(joined(moving, fixed)), moving)
        return out, pullback(out)[0]

    text = jax.jit(both).lower(arrays).compile().as_text()
    names = r" (all-gather|all-to-all|collective-\\w+|all-reduce)(?:-start)?\\("
    return sorted(set(re.findall(names, text)))


x = shaped(np.zeros((4, 20, 4, 8), np.float32), "data", None, "model")
found = {}
for name, variant in VARIANTS.items():
    variant = variant.bind(**variant.trial)
    trial = Trial(variant)
    arrays = trial.full(trial.inputs(20, 20, 8))
    arrays |= dict(query=x, key=x, value=x)
    if variant.key_mask:
        arrays["key_mask"] = shaped(np.ones((4, 20), bool), "data")
    if "params" in arrays:
        arrays["params"] = jax.tree.map(
            lambda leaf: shaped(np.broadcast_to(leaf, (4, *leaf.shape)), "model"),
            arrays["params"],
        )
    attend = functools.partial(multi_head(variant), is_causal=variant.causal)
    found[name] = collectives(lambda a: attend(**a), arrays)

three = dict(query=x, key=x, value=x)
found["default"] = collectives(lambda a: dot_product_attention(**a), three)
found["jax.nn"] = collectives(lambda a: jax.nn.dot_product_attention(**a), three)
for name in ("blockwise", "linear"):
    layer = nnx.MultiHeadAttention(
        num_heads=4, in_features=8, decode=False, rngs=nnx.Rngs(0),
        attention_fn=as_attention_fn(name),
    )
    frames = shaped(np.zeros((4, 20, 8), np.float32), "data")
    found[f"layer {name}"] = collectives(
        lambda a, layer=layer: layer(a["query"]), {"query": frames}
    )
print(json.dumps(found))
"""


def test_sharded_arrays_stay_where_they_are():
    said = helpers.run("-c", COLLECTIVES, devices=4, JAX_PLATFORMS="cpu")
    found = json.loads(said.splitlines()[-1])
    assert found.keys() > VARIANTS.keys()
    assert found["jax.nn"] == []
    for name, collectives in found.items():
        # Gradients of parameters that all examples share are summed.
        shared = name in VARIANTS and VARIANTS[name].init is not None
        allowed = {"all-reduce"} if shared else set()
        assert set(collectives) <= allowed, (name, collectives)
