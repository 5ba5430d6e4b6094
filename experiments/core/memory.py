"""Keeps freed memory in the process, where the C library would give it back."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> bool:
    """Makes glibc reuse large blocks; call it before the first computation.

    XLA:CPU allocates a program's temporary memory anew at every execution. A block of
    more than 32 MiB is by default mapped from and returned to the kernel each time,
    which then clears every page again. `python -m benchmarks --before` shows what that
    costs a training step at a large batch.

    Returns:
      Whether it was done; elsewhere than on Linux with a recent glibc nothing happens.

    >>> keep_freed_memory() in (True, False)
    True
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older releases refuse a threshold above 32 MiB; the rest would then do harm.
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        return False
    settings = {
        _M_TRIM_THRESHOLD: (1 << 31) - 1,
        _M_TOP_PAD: 1 << 26,
        # A thread's own arena cannot hold blocks of more than 64 MiB.
        _M_ARENA_MAX: 1,
    }
    return all([mallopt(name, value) for name, value in settings.items()])
