"""Runs the code that pages show, and puts what it printed below it.

Three kinds of blocks are taken, and every other is left as it is:

    ```python run          executed; names last to the end of the page, and the value of
                           a last expression is shown as a notebook shows it
    ```python file=a.py    written to that file, for the blocks after it
    ```sh run              lines `attn-jax ...` and `python -m attn_jax ...`, in this
                           process; a status other than 0 is an error

All run in one process, in a folder of their own that is deleted; no kernel, no network.
What fails stops the build and names page and line.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from attn_jax.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^```(?P<kind>python run|sh run|python file=(?P<file>[\w.]+))\n"
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class CellError(RuntimeError):
    """A block of a page failed."""


def _plain(value: Any) -> Any:
    """A value as one reads it: an array without axes as its number."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, jax.Array) and not value.ndim else value


def _python(code: str, names: dict[str, Any], where: str, line: int) -> None:
    """Runs a block; prints the value of its last expression."""
    tree = ast.parse(code, where)
    ast.increment_lineno(tree, line)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, where, "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), where, "eval"), names)
        if value is not None:
            print(repr(_plain(value)))


def _shell(code: str) -> None:
    """Runs commands of attn_jax; a line that ends in a backslash goes on."""
    for command in code.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words[:3] == ["python", "-m", "attn_jax"]:
            words = ["attn-jax", *words[3:]]
        if not words:
            continue
        if words[0] != "attn-jax":
            raise CellError(
                f"only `attn-jax` and `python -m attn_jax`, got {command!r}"
            )
        try:
            status = main(words[1:])
        except SystemExit as end:
            status = end.code
        if status:
            raise CellError(f"{command!r} ended with {status}")


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    """A folder of its own as the working one, from which blocks import their files."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
            os.chdir(before)


def outputs(page: str, where: str) -> list[str]:
    """What the blocks of a page print, one after the other.

    Raises:
      CellError: a block fails.
    """
    names: dict[str, Any] = {"__name__": "__page__"}
    found = []
    with _folder():
        for block in BLOCK.finditer(page):
            line = page.count("\n", 0, block.start("code"))
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    if block["file"]:
                        pathlib.Path(block["file"]).write_text(block["code"], "utf-8")
                    elif block["kind"] == "sh run":
                        _shell(block["code"])
                    else:
                        _python(block["code"], names, where, line)
            except Exception as error:
                raise CellError(
                    f"{where}, line {line + 1}: {type(error).__name__}: {error}\n"
                    f"{printed.getvalue()[-2000:]}"
                ) from error
            found.append(printed.getvalue().replace(f"{os.getcwd()}{os.sep}", ""))
    return found


def _stamp(page: str) -> str:
    """Of the page's blocks, of what runs them, and of the packages that they use."""
    seen = hashlib.sha256(jax.__version__.encode())
    seen.update(pathlib.Path(__file__).read_bytes())
    for block in BLOCK.finditer(page):
        seen.update(block[0].encode())
    for package in ("attn_jax", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            seen.update(path.read_bytes())
    return seen.hexdigest()


def printed(page: str, where: str, kept: pathlib.Path | None = None) -> list[str]:
    """`outputs`, from a file of them where neither blocks nor packages have changed."""
    known = json.loads(kept.read_text("utf-8")) if kept and kept.is_file() else {}
    stamp = _stamp(page)
    if stamp not in known:
        known[stamp] = outputs(page, where)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(known), "utf-8")
    return known[stamp]


def run(page: str, where: str, kept: pathlib.Path | None = None) -> str:
    """A page with the outputs below its blocks.

    Args:
      page: its Markdown.
      where: what it is called in messages.
      kept: a file of outputs; what neither blocks nor packages have changed is taken
        from there.

    Raises:
      CellError: a block fails.
    """
    told = iter(printed(page, where, kept))

    def shown(block: re.Match[str]) -> str:
        language = "sh" if block["kind"] == "sh run" else "python"
        head = f"```{language}\n"
        if block["file"]:
            head = f"```{{code-block}} {language}\n:caption: {block['file']}\n"
        output = next(told).rstrip()
        below = f"\n\n```text\n{output}\n```" if output else ""
        return f"{head}{block['code']}```{below}"

    return BLOCK.sub(shown, page)
