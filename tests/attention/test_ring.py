"""Ring attention: equal to attention on the whole sequence, on eight devices of a CPU.

The programs run in a process of its own, which has that many devices.
"""

from __future__ import annotations

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from attn_jax import dot_product_attention
from attn_jax.attention.ring_attention import ring
from attn_jax.tools import cost
from tests import helpers

EQUALS = """
import functools, itertools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from attn_jax import dot_product_attention

random = np.random.default_rng(0)
B, T, N, K, H, V = 2, 128, 4, 2, 8, 5

def draw(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

arrays = draw(B, T, N, H), draw(B, T, K, H), draw(B, T, K, V)
cotangent = draw(B, T, N, V)
key_mask = jnp.asarray(random.random((B, T)) > 0.3).at[0, :37].set(False)
key_mask = key_mask.at[1].set(False)  # nothing to see in the second example

@functools.partial(jax.jit, static_argnames=("causal", "implementation", "mesh_axis"))
def run(placed, mask, causal, **options):
    attend = functools.partial(
        dot_product_attention, key_mask=mask, is_causal=causal, **options
    )
    out, pullback = jax.vjp(attend, *placed)
    return out, *pullback(cotangent)

said = []
for sizes, kind in (((2, 4), "Auto"), ((1, 8), "Explicit"), ((2, 4), "Explicit")):
    mesh = jax.make_mesh(sizes, ("data", "sequence"), (AxisType[kind],) * 2)
    place = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    placed = jax.device_put(arrays, place)
    cotangent = jax.device_put(cotangent, place)
    cases = [(key_mask, True)]
    if sizes == (2, 4) and kind == "Auto":
        cases = itertools.product((None, key_mask), (False, True))
    for mask, causal in cases:
        moved = mask if mask is None else jax.device_put(mask, place)
        options = dict(implementation="ring", mesh_axis="sequence")
        ring = functools.partial(run, causal=causal, **options)
        with jax.set_mesh(mesh):
            ours = ring(placed, moved)
        theirs = run(arrays, mask, causal, implementation="reference")
        worst = [
            float(jnp.abs(np.asarray(x) - np.asarray(y)).max())
            for x, y in zip(ours, theirs)
        ]
        said.append(worst)
        assert all(np.isfinite(np.asarray(x)).all() for x in ours)
        assert len(ours[0].sharding.device_set) == 8
        assert ours[0].addressable_shards[0].data.shape[1] == T // sizes[1]
# Arrays that lie on a mesh tell by themselves how they are split.
mesh = jax.make_mesh((8,), ("sequence",), (AxisType.Auto,))
placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(None, "sequence")))
ours = dot_product_attention(*placed, implementation="ring")
theirs = dot_product_attention(*arrays, implementation="reference")
said.append([float(jnp.abs(np.asarray(ours) - np.asarray(theirs)).max())])
print(json.dumps(said))
"""


def test_equals_the_whole_sequence_forward_and_backward_on_eight_devices():
    said = json.loads(helpers.run("-c", EQUALS, devices=8, JAX_PLATFORMS="cpu"))
    assert len(said) == 4 + 2 + 1
    assert max(map(max, said)) < 1e-5


NOTHING_SHOWS = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec
from attn_jax.attention import dot_product, ring
from attn_jax.attention.ring_attention import deal, undeal

mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
spec = PartitionSpec("x")
def split(fn):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))

tokens = jnp.arange(32)
dealt = split(functools.partial(deal, axis_name="x"))(tokens)
back = split(functools.partial(undeal, axis_name="x"))(dealt)
said = dict(dealt=dealt.tolist(), back=back.tolist())
random = np.random.default_rng(0)
x = jnp.asarray(random.normal(size=(32, 4)), jnp.float32)
options = dict(axis_name="x", is_causal=True, block_size=3)
one = split(functools.partial(ring, **options))(x, x, x)
order = np.asarray(dealt)
two = split(functools.partial(ring, **options, is_dealt=True))(*[x[order]] * 3)
said["dealt_before"] = float(jnp.abs(one[order] - two).max())
# What is padding may hold anything, and what comes later does not matter.
nan = x.at[20:].set(jnp.nan)
mask = jnp.arange(32) < 20
masked = split(lambda q, k, v, m: ring(q, k, v, key_mask=m, **options))

def loss(q, k, v):
    return jnp.sum(masked(q, k, v, mask)[:20] ** 2)

grads = jax.jit(jax.grad(loss, (0, 1, 2)))(x, nan, nan)
said["finite"] = bool(all(jnp.isfinite(g).all() for g in grads))
other = x.at[20:].set(3.0)
later = masked(x, other, other, jnp.ones(32, bool))
whole = dot_product(x, x, x, is_causal=True)
said["first"] = float(jnp.abs(later[:20] - whole[:20]).max())
wide = split(functools.partial(ring, axis_name="x", is_causal=True))
narrow = [x.astype(jnp.bfloat16)] * 3
exact = dot_product(*[a.astype(jnp.float32) for a in narrow], is_causal=True)
said["bfloat16"] = float(jnp.abs(wide(*narrow).astype(jnp.float32) - exact).max())
print(json.dumps(said))
"""


def test_tokens_are_dealt_out_and_padding_never_shows():
    said = json.loads(helpers.run("-c", NOTHING_SHOWS, devices=4, JAX_PLATFORMS="cpu"))
    assert said["dealt"] == [i + 4 * a for i in range(4) for a in range(8)]
    assert said["back"] == list(range(32))
    assert said["dealt_before"] < 1e-6
    assert said["finite"]
    assert said["first"] < 1e-5
    assert said["bfloat16"] < 0.02


def local_program(devices: int, is_causal: bool, length: int = 8_192):
    """Attention and its gradient on a mesh without devices; and what goes in."""
    mesh = AbstractMesh((devices,), ("x",), (AxisType.Auto,))
    spec = PartitionSpec(None, "x")

    def local(query, key, value):
        def loss(query, key, value):
            out = dot_product_attention(
                query, key, value,
                implementation="ring", mesh_axis="x", is_causal=is_causal,
            )  # fmt: skip
            return jnp.sum(out**2)

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    return run, [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)] * 3


def test_no_device_idles_where_attention_is_causal():
    # All devices run one program, so what counts is how much of the square it makes.
    full, causal = (
        cost.count_flops(program, *arrays).products
        for program, arrays in (local_program(8, causal) for causal in (False, True))
    )
    assert 0.5 < causal / full < 0.6


MEMORY = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from attn_jax.attention import ring

said = {}
for devices in (2, 8):
    mesh = jax.make_mesh(
        (devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    attend = jax.shard_map(
        functools.partial(ring, axis_name="x", is_causal=True, block_size=64),
        mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"),
    )
    place = jax.sharding.NamedSharding(mesh, PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((65_536, 64), jnp.float32, sharding=place)
    grad = jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), (0, 1, 2))
    program = jax.jit(grad, out_shardings=(place,) * 3).lower(x, x, x).compile()
    memory, text = program.memory_analysis(), program.as_text()
    said[devices] = dict(
        memory=memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        gathers=text.count("all-gather("),
        messages=text.count("collective-permute("),
    )
print(json.dumps(said))
"""


def test_memory_falls_with_the_number_of_devices_and_nothing_is_gathered():
    said = json.loads(helpers.run("-c", MEMORY, devices=8, JAX_PLATFORMS="cpu"))
    assert said["8"]["memory"] / said["2"]["memory"] < 0.3
    assert all(one["messages"] for one in said.values())
    assert not any(one["gathers"] for one in said.values())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    program, arrays = local_program(4, True, 256)
    exported = jax.export.export(jax.jit(program), platforms=[platform])(*arrays)
    text = exported.mlir_module()
    assert "collective_permute" in text and "all_to_all" in text
    assert "f64" not in text and "callback" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mesh_axis": "y"}, "`mesh_axis` must name the axis .* of 'x', but is 'y'"),
        ({}, "`mesh_axis` must name the axis .* of 'x', but is None"),
        ({"mesh_axis": "x", "length": 30}, "T to be a multiple of the 4 devices along"),
        ({"mesh_axis": "x", "length": 40, "is_causal": True}, "4² = 16, but T=40"),
        ({"mesh_axis": "x", "bias": jnp.zeros((1, 1, 1, 1))}, "has no `bias`; use"),
        ({"mesh_axis": "x", "local_window_size": 3}, "has no `local_window_size`"),
    ],
)
def test_what_it_cannot_serve_is_told(options, message):
    options = dict(options)
    length = options.pop("length", 32)
    mesh = AbstractMesh((4,), ("x",), (AxisType.Auto,))
    x = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)

    def attend(query):
        return dot_product_attention(
            query, query, query, implementation="ring", **options
        )

    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, x)


def test_without_a_mesh_it_says_so():
    x = jnp.zeros((1, 4, 1, 4))
    with pytest.raises(ValueError, match="splits the sequence over a mesh, and there"):
        dot_product_attention(x, x, x, implementation="ring")
    with pytest.raises(ValueError, match="needs as many keys as queries"):
        ring(x[0, :, 0], x[0, :3, 0], x[0, :3, 0], axis_name="x", is_causal=True)


def test_forward_mode_is_refused_with_what_helps():
    mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,))
    x = jnp.asarray(np.ones((1, 4, 1, 4), np.float32))
    with jax.set_mesh(mesh), pytest.raises(TypeError, match="reverse mode alone"):
        jax.jvp(
            lambda x: dot_product_attention(
                x, x, x, implementation="ring", mesh_axis="x"
            ),
            (x,),
            (x,),
        )
