"""Variables of the environment with which programs compile quickly.

The tests run so: they are hundreds of programs that run once, and compiling them is
nearly all of their time. What is computed stays the same. For another command:

    python tests/quick_compilation.py COMMAND ARGUMENT ...
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import shutil
import sys
from importlib.metadata import version

from packaging.version import Version


def xla_flags() -> list[str]:
    """Flags of XLA that help and that this jaxlib has.

    XLA ends the process on a flag that it does not know: nothing else sets any, and a
    test holds these against jaxlib itself.
    """
    if Version(version("jaxlib")) < Version("0.11.1"):
        return ["--xla_cpu_use_fusion_emitters=false"]
    return []  # the newer emitters of fusions have no alternative any more


def environment() -> dict[str, str]:
    """The variables; what XLA_FLAGS holds already stays, and wins."""
    held = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in held}
    ours = [flag for flag in xla_flags() if flag.partition("=")[0] not in names]
    return {
        # Without most optimisations programs compile several times faster.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "XLA_FLAGS": " ".join([*held, *ours]),
    }


#: Compiled programs that are kept from one session of tests to the next, at most.
_KEPT_BYTES = 1 << 30


def kept_programs() -> str | None:
    """A folder for compiled programs, made here; None where none can be written.

    Each jaxlib and each kind of CPU has its own: XLA warns of code that was compiled
    for another. All of it goes once it is larger than a gigabyte.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = pathlib.Path(base).expanduser() / "attn_jax" / "compiled"
    cpu = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu += sorted({x for x in lines if x.startswith(("model name", "flags"))})
    kind = hashlib.sha256("\n".join(cpu).encode()).hexdigest()[:16]
    folder = root / f"{version('jax')}-{version('jaxlib')}-{kind}"
    try:
        if "PYTEST_XDIST_WORKER" not in os.environ:  # before the workers start
            files = list(root.rglob("*"))
            if sum(path.lstat().st_size for path in files) > _KEPT_BYTES:
                shutil.rmtree(root)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ | environment())
