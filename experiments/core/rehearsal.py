"""Whose an error is, and where: messages of ours, tracebacks of all others."""

from __future__ import annotations

import pathlib
import traceback

from attn_jax.variant import Variant

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOT / name) + "/" for name in ("experiments", "attn_jax"))


def is_message(error: BaseException) -> bool:
    """Whether a line is enough: the error was raised on purpose, by our own code."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    last = frames[-1]
    return last.filename.startswith(_OURS) and (last.line or "").startswith("raise ")


def does_not_run(attention: str | Variant, where: str, error: Exception) -> ValueError:
    """The error to raise where an attention variant fails inside a model.

    Args:
      attention: as it was asked for, a name or "path/file.py:function".
      where: the model.
      error: what came. Of a user's file, all lines that led to it are told.

    Returns:
      To be raised from ``error``.
    """
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    place = lines = ""
    if isinstance(attention, str) and ".py:" in attention:
        file = pathlib.Path(attention.rpartition(":")[0]).expanduser().resolve()
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            i
            for i, frame in enumerate(frames)
            if pathlib.Path(frame.filename).resolve() == file
        ]
        if own:
            last = frames[own[-1]]
            place = f", line {last.lineno} of {last.filename}"
            told = "".join(traceback.format_list(frames[own[0] :]))
            lines = f"\nHow it came there:\n{told.rstrip()}"
    return ValueError(
        f"attention: {attention!r} does not run inside {where}{place}: {kind}{error}"
        f"{lines}"
    )
