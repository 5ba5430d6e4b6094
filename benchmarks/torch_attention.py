"""PyTorch's attention: the call that is timed, and the memory that it takes.

PyTorch does not say what a call on a CPU takes, so `peak_bytes` looks at the process:
`python -m benchmarks.torch_attention` makes each call in a short process of its own and
prints by how much the maximum of its resident memory grew, inputs and outputs included.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the short processes are not to load JAX
    from benchmarks.timing import Call

AVAILABLE = importlib.util.find_spec("torch") is not None


def tensors(arrays: Sequence[np.ndarray]) -> list[Any]:
    """Copies [B, T, N, H] to [B, N, T, H], the layout that PyTorch is fastest in."""
    import torch

    return [torch.from_numpy(x.transpose(0, 2, 1, 3).copy()) for x in arrays]


def call(inputs: Sequence[Any], *, backward: bool, causal: bool) -> Call:
    """PyTorch's scaled_dot_product_attention.

    Args:
      inputs: query, key, value and, if `backward`, the cotangent: [B, N, T, H] each.
      backward: also the gradients.
      causal: as `is_causal`.

    Returns:
      The call, which returns the output [B, N, T, H], or (output, gradients).
    """
    import torch

    (query, key, value), cotangent = inputs[:3], inputs[3:]
    attend = torch.nn.functional.scaled_dot_product_attention
    for tensor in (query, key, value):
        tensor.requires_grad_(backward)

    def forward() -> Any:
        with torch.no_grad():
            return attend(query, key, value, is_causal=causal)

    def both() -> Any:
        out = attend(query, key, value, is_causal=causal)
        return out.detach(), torch.autograd.grad(out, inputs[:3], cotangent)

    return both if backward else forward


def _grown(shape: Sequence[int], backward: bool, causal: bool) -> int:
    """Bytes by which this process's maximum resident memory grows for one call."""
    import torch

    def run(shape: Sequence[int]) -> None:
        inputs = [torch.randn(*shape) for _ in range(4 if backward else 3)]
        call(inputs, backward=backward, causal=causal)()

    run((1, 1, 64, 8))  # loads what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(shape)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_bytes(settings: Sequence[dict[str, Any]]) -> list[int | None]:
    """Peak memory of one call in each setting, inputs and outputs included.

    Args:
      settings: each with `shape` [B, N, T, H], `backward` and `causal`.

    Returns:
      Bytes; None each where this system cannot tell.
    """
    if not sys.platform.startswith("linux"):
        return [None] * len(settings)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.torch_attention", json.dumps(settings)],
        check=True,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    return json.loads(done.stdout)


def _main() -> None:
    """Makes each call in a fork: all begin with PyTorch loaded and nothing else."""
    import torch  # noqa: F401

    found = []
    for setting in json.loads(sys.argv[1]):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.write(writer, str(_grown(**setting)).encode())
            os._exit(0)
        os.close(writer)
        os.wait()
        with os.fdopen(reader) as told:
            found.append(int(told.read()))
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
