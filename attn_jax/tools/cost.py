"""What a JAX program costs: operations, memory, every array, and how they grow.

Operations are counted from the jaxpr. XLA's own count (`compiled.cost_analysis()`)
takes the body of a loop once, so it is wrong for every program that loops over blocks
or heads. Here the body of a loop counts as often as it runs. How many of them must wait
for one another is in `attn_jax.tools.chain`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from attn_jax import models
from attn_jax.nn.positional import num_parameters

__all__ = [
    "Cost",
    "Flops",
    "LabellerCost",
    "Program",
    "array_sizes",
    "available_memory",
    "call_cost",
    "count_flops",
    "fastest_growth",
    "fit_exponent",
    "labeller_cost",
    "model_cost",
    "program",
    "size_text",
    "sizes_table",
]


class Flops(NamedTuple):
    """Floating-point operations of one call.

    Attributes:
      products: of matrix products and convolutions, a multiply-add as two.
      other: of everything else, one an element.
      exact: False if the program does at least so many: a loop's length depends on
        data, so that its body was counted once, or what a call outside of JAX does (a
        library's kernel, a callback) cannot be seen.
    """

    products: int
    other: int
    exact: bool = True

    @property
    def total(self) -> int:
        """All operations."""
        return self.products + self.other

    def _plus(self, more: Flops, times: int = 1) -> Flops:
        return Flops(
            self.products + times * more.products,
            self.other + times * more.other,
            self.exact and more.exact,
        )


_NOTHING = Flops(0, 0)

# What only moves, selects, compares or converts values. Everything else that returns
# floating-point numbers counts one an element.
FREE = frozenset(
    """
    all_gather all_to_all argmax argmin bitcast_convert_type broadcast_in_dim clamp
    concatenate conj convert_element_type copy copy_p device_put dynamic_slice
    dynamic_update_slice empty eq expand_dims full gather ge gt imag iota is_finite le
    lt ne optimization_barrier pad ppermute pvary random_bits random_unwrap random_wrap
    real reduce_precision reshape rev scatter select_and_scatter select_n
    sharding_constraint slice sort split squeeze stop_gradient top_k transpose
    """.split()
)

# Calls of code that has no jaxpr.
OPAQUE = frozenset(
    """
    custom_call cudnn_fusion ffi_call io_callback pure_callback
    dot_product_attention_fwd_wrapper dot_product_attention_bwd_wrapper
    """.split()
)

# One an element of what goes in, not of what comes out.
BY_INPUT = frozenset(
    """
    cumlogsumexp cummax cummin cumprod cumsum psum psum_invariant reduce_and
    reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
    """.split()
)


def _size(shape: Any) -> int:
    return math.prod(shape)


def is_float(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _dot_general(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0].aval.shape) * _size(left[axis] for axis in contract)


def _convolution(eqn: Any) -> int:
    """Every output as a full product with the kernel, also where padding is zero.

    The zeros between the elements of a dilated input (as in the gradient of a
    convolution with strides) are left out.
    """
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    # The kernel's input-feature axis is already divided by feature_group_count, and
    # the output's batch axis by batch_group_count.
    per_output = _size(kernel) // kernel[numbers.rhs_spec[0]]
    dilation = _size(eqn.params["lhs_dilation"])
    return 2 * _size(eqn.outvars[0].aval.shape) * per_output // dilation


def _fft(eqn: Any) -> int:
    """5 n log₂ n each, the usual count."""
    points = _size(eqn.params["fft_lengths"])
    shapes = (eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
    number = max(map(_size, shapes)) // points
    return int(5 * number * points * math.log2(max(points, 2)))


def _factorization(share: float) -> Callable[[Any], int]:
    """`share` · m · n² for each m x n matrix with m >= n."""

    def count(eqn: Any) -> int:
        *batch, m, n = eqn.invars[0].aval.shape
        return int(share * _size(batch) * max(m, n) * min(m, n) ** 2)

    return count


def _triangular_solve(eqn: Any) -> int:
    shape = eqn.invars[1].aval.shape
    order = eqn.invars[0].aval.shape[-1]
    return _size(shape) * order


PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "fft": _fft,
    "cholesky": _factorization(1 / 3),
    "lu": _factorization(2 / 3),
    "geqrf": _factorization(4 / 3),
    "qr": _factorization(4 / 3),
    "householder_product": _factorization(4 / 3),
    "eigh": _factorization(9),
    "svd": _factorization(13),
    "triangular_solve": _triangular_solve,
}


def _of_equation(eqn: Any) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _NOTHING._plus(_of_jaxpr(params["jaxpr"]), params["length"])
    if name == "while":
        body = _of_jaxpr(params["body_jaxpr"])._plus(_of_jaxpr(params["cond_jaxpr"]))
        return body._replace(exact=False)
    if name == "custom_linear_solve":  # the others are its transpose and its check
        return _of_jaxpr(params["jaxprs"].solve)
    if name in OPAQUE:
        return _NOTHING._replace(exact=False)
    if name == "cond":
        return max(map(_of_jaxpr, params["branches"]), key=lambda flops: flops.total)
    if name == "shard_map":
        return _NOTHING._plus(_of_jaxpr(params["jaxpr"]), params["mesh"].size)
    if name == "pallas_call":
        grid = [n if isinstance(n, int) else 1 for n in params["grid_mapping"].grid]
        return _NOTHING._plus(_of_jaxpr(params["jaxpr"]), _size(grid))
    if name in PRODUCTS:
        return Flops(PRODUCTS[name](eqn), 0)
    if name.startswith("scatter") and name != "scatter":  # scatter-add and the like
        return Flops(0, _size(eqn.invars[2].aval.shape))
    if name in FREE:
        return _NOTHING
    if name.startswith("reduce_window"):
        window = _size(params["window_dimensions"])
        return Flops(0, window * sum(_size(x.aval.shape) for x in eqn.outvars))
    if name in BY_INPUT:
        return Flops(0, sum(_size(x.aval.shape) for x in eqn.invars if is_float(x)))
    inner = list(core.jaxprs_in_params(params))
    if inner:  # jit, checkpoint, custom_jvp_call, custom_vjp_call, ...
        total = _NOTHING
        for jaxpr in inner:
            total = total._plus(_of_jaxpr(jaxpr))
        return total
    return Flops(0, sum(_size(x.aval.shape) for x in eqn.outvars if is_float(x)))


def _of_jaxpr(jaxpr: Any) -> Flops:
    total = _NOTHING
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total = total._plus(_of_equation(eqn))
    return total


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Flops:
    """Counts the floating-point operations of `fn(*args, **kwargs)`; computes nothing.

    | what | counts |
    |---|---|
    | matrix product | 2 a multiply-add, for each entry of its batch |
    | convolution | 2 a multiply-add of an output with its group's kernel |
    | ... zeros of padding | included, as is usual |
    | ... zeros between the elements of a dilated input | left out |
    | other arithmetic on floating-point numbers, exp and tanh too | 1 an element |
    | reduction, cumulative sum | 1 an element of its input |
    | pooling | 1 an element of each window |
    | fft of n points | 5 n log₂ n |
    | Cholesky, LU, QR, ..., triangular solve | the textbook's leading term |
    | integers, comparisons, selection, copies, conversions, sorting | nothing |
    | `scan`, `lax.map`, `fori_loop` of known length | the body, as often as it runs |
    | `cond` | its dearest branch |
    | `while_loop` | its body once, and the result is not `exact` |
    | calls without a jaxpr (cuDNN, ffi, callbacks) | nothing; not `exact` |
    | custom_vjp, custom_jvp, checkpoint, jit | what is inside |
    | shard_map | the work of all devices |

    It is the program as written, before XLA removes what nobody reads and fuses (which
    may compute something twice). Differentiate first to count a gradient: what a custom
    rule recomputes is then included.

    Args:
      fn: a function that JAX can trace.
      *args: its arguments; `jax.ShapeDtypeStruct` will do for arrays.
      **kwargs: named arguments, traced like the others.

    Returns:
      The counts.

    >>> a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    >>> count_flops(jnp.matmul, a, b)
    Flops(products=120, other=0, exact=True)
    >>> def ten(x):
    ...     return jax.lax.fori_loop(0, 10, lambda i, x: jnp.exp(x), x)
    >>> count_flops(ten, jnp.ones(7)).total
    70
    """
    return _of_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs))


class Cost(NamedTuple):
    """What a model costs: parameters, and forward FLOPs of what it is called with."""

    params: int
    flops: int


class LabellerCost(NamedTuple):
    """What a labeller costs: parameters by part, and forward FLOPs of one vector."""

    params: int
    input_params: int
    position_params: int
    flops: float


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _measure(model: nnx.Module, *inputs: Any) -> tuple[Any, int]:
    """The parameters of a model, and the FLOPs of its forward pass."""
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states

    def forward(params: Any, rest: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, params, rest)(*inputs)

    return params, count_flops(forward, params, rest, *inputs).total


def model_cost(model: nnx.Module, image_shape: tuple[int, int, int]) -> Cost:
    """Counts parameters, and the FLOPs of the forward pass of one image.

    Args:
      model: maps images [B, height, width, C] to logits; its arrays may be abstract
        (`nnx.eval_shape`), nothing is computed.
      image_shape: (height, width, channels).

    >>> model = models.build("mlp", "mu", image_shape=(28, 28, 1), num_classes=10,
    ...                      rngs=nnx.Rngs(0))
    >>> model_cost(model, (28, 28, 1)).params
    3309578
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return call_cost(model, images)


def call_cost(model: nnx.Module, *inputs: Any) -> Cost:
    """Counts parameters, and the FLOPs of a call of any module.

    Args:
      model: its arrays may be abstract (`nnx.eval_shape`), nothing is computed.
      *inputs: what it is called with, arrays or `jax.ShapeDtypeStruct`.

    >>> call_cost(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 3))).params
    16
    """
    params, flops = _measure(model, *inputs)
    return Cost(_count(params), flops)


def labeller_cost(
    model: models.Labeller, inputs: int | Sequence[int], length: int
) -> LabellerCost:
    """Counts parameters, and the FLOPs of one sequence, over its length.

    Args:
      model: its arrays may be abstract (`nnx.eval_shape`), nothing is computed.
      inputs: as given to `Labeller`.
      length: T of the sequence.

    Returns:
      Parameters in all, of the input layer and of the positions, and the FLOPs of the
      forward pass of one sequence, divided by T.

    >>> model = models.Labeller(40, 6, body="window", dim=8, depth=1, mlp_dim=16,
    ...                         max_length=9, rngs=nnx.Rngs(0))
    >>> labeller_cost(model, 40, 9).input_params
    328
    """
    vectors = not isinstance(inputs, Sequence)
    size = len(inputs) if isinstance(inputs, Sequence) else inputs
    x = jax.ShapeDtypeStruct((1, length, size), jnp.float32 if vectors else jnp.int32)
    params, flops = _measure(model, x, jax.ShapeDtypeStruct((1, length), jnp.bool_))
    encoder = getattr(model.body, "encoder", None)
    positions = None if encoder is None else encoder.positions
    return LabellerCost(
        _count(params),
        _count(params["input"]),
        0 if positions is None else num_parameters(positions),
        flops / length,
    )


def sizes_table() -> list[dict[str, Any]]:
    """What every named size costs, at the image size that sizes were chosen for.

    Returns:
      One dictionary a size: family, size, image_shape, params, flops.
    """
    rows = []
    for model, sizes in models.SIZES.items():
        for size in sizes:
            shape = (28, 28, 1) if size.startswith("mu") else (32, 32, 3)
            make = functools.partial(
                models.build, model, size, image_shape=shape, num_classes=10
            )
            abstract = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
            row = dict(model=model, size=size, image_shape=shape)
            rows.append(row | model_cost(abstract, shape)._asdict())
    return rows


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled call and what it costs.

    Attributes:
      call: runs it and waits for the result, which it returns.
      flops: counted from its jaxpr.
      temp_bytes: temporary memory, by XLA's plan; None where XLA has none. Fusions
        that XLA:CPU leaves to a library are not in that plan: for the largest of them
        the products inside are added. What else libraries take is not in it.
      peak_bytes: arguments, outputs and temporaries together.
    """

    call: Callable[[], Any]
    flops: Flops
    temp_bytes: int | None
    peak_bytes: int | None


def program(fn: Callable[..., Any], *args: Any) -> Program:
    """Compiles `fn(*args)`; nothing is computed.

    Args:
      fn: a function that JAX can trace.
      *args: its arguments; with `jax.ShapeDtypeStruct` among them it can be costed,
        but not called.

    >>> x = jnp.ones((64, 64))
    >>> made = program(jnp.matmul, x, x)
    >>> made.flops.total, made.peak_bytes >= 3 * 64 * 64 * 4, made.call().shape
    (524288, True, (64, 64))
    """
    compiled = jax.jit(fn).lower(*args).compile()
    memory = compiled.memory_analysis()
    temp = peak = None
    if memory is not None:
        temp = memory.temp_size_in_bytes
        if jax.default_backend() == "cpu":
            temp += _unplanned_bytes(compiled.as_text() or "")
        peak = (
            temp
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return Program(
        call=lambda: jax.block_until_ready(compiled(*args)),
        flops=count_flops(fn, *args),
        temp_bytes=temp,
        peak_bytes=peak,
    )


_RESULT = re.compile(r"^\s+%\S+ = [a-z]+(\d+)\w*\[([\d,]*)\]\S* (?:dot|convolution)\(")


def _unplanned_bytes(hlo: str) -> int:
    """What the largest fusion of XLA:CPU that a library computes holds for itself.

    Such a fusion may hold a whole attention, scores included, of which XLA's plan sees
    only what goes in and comes out. Counted are the results of the products in it that
    do not leave it.
    """
    held: dict[str, int] = {}
    name = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0]
        found = _RESULT.match(line)  # not the ROOT, which is in the plan
        if found:
            bits, sizes = found.groups()
            elements = math.prod(int(size) for size in sizes.split(",") if size)
            held[name] = held.get(name, 0) + elements * int(bits) // 8
    called = re.findall(r"kind=kCustom, calls=(%[\w.\-]+)", hlo)
    return max((held.get(name, 0) for name in called), default=0)


def available_memory() -> int | None:
    """Bytes that are free on the default device; None where that cannot be told.

    On CPU it is what Linux calls available, or what the control group still allows.

    >>> free = available_memory()
    >>> free is None or free > 0
    True
    """
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = []
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
        group = pathlib.Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            found.append(max(int(limit) - used, 1))
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Slope of log cost over log size by least squares: cost ~ size^slope.

    Args:
      sizes: such as lengths T.
      costs: what each costs, in any unit.

    Returns:
      The slope; None for fewer than three sizes or a cost of zero.

    >>> round(fit_exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    if len(sizes) < 3 or min(costs) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    if spread == 0:
        return None
    together = zip(x, y, strict=True)
    return sum((a - mean_x) * (b - mean_y) for a, b in together) / spread


def array_sizes(jaxpr: Any) -> list[int]:
    """Elements of every array that a jaxpr makes, in loops and calls too, in order.

    >>> array_sizes(jax.make_jaxpr(lambda x: (x[:, None] + x[None, :]).sum())(
    ...     jnp.ones(8)))
    [8, 8, 64, 1]
    """
    sizes = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for variable in eqn.outvars:
            sizes.append(math.prod(getattr(variable.aval, "shape", ())))
        for inner in core.jaxprs_in_params(eqn.params):
            sizes += array_sizes(inner)
    return sizes


def fastest_growth(
    sizes: Sequence[Sequence[int]], lengths: Sequence[int]
) -> tuple[float, int]:
    """The exponent of the array that grows fastest, and its size at the last length.

    Arrays are matched by their place in the program; if the programs of different
    lengths differ in form, the largest array of each stands for all.

    Args:
      sizes: from `array_sizes`, one list for each length.
      lengths: T, rising.

    >>> fastest_growth([[8, 8**2], [16, 16**2], [32, 32**2]], (8, 16, 32))
    (2.0, 1024)
    """
    if len({len(one) for one in sizes}) > 1:
        sizes = [[max(one, default=1)] for one in sizes]
    fastest, largest = 0.0, 1
    for one in zip(*sizes, strict=True):
        # Arrays below T elements are parts of a fixed size, or grow without harm.
        if one[-1] < lengths[-1] or min(one) == 0:
            continue
        slope = fit_exponent(lengths, one) or 0.0
        if round(slope, 6) > fastest or (
            round(slope, 6) == fastest and one[-1] > largest
        ):
            fastest, largest = round(slope, 6), one[-1]
    return fastest, largest


def size_text(count: float | None) -> str:
    """Bytes for people.

    >>> size_text(3 * 2**20), size_text(100), size_text(None)
    ('3.0 MiB', '100 B', '-')
    """
    if count is None:
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
