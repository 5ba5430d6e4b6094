"""The reference: a page for each public module, made of its docstrings.

A module is public where no part of its name begins with an underscore, and what is
public in it stands in its `__all__`. A name appears once, on the page of the module
that it is written in, as the path by which it is best imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import types
from collections.abc import Container, Iterator, Mapping
from typing import Any

import attn_jax

# Packages that give the names of their modules as their own.
NAMESPACES = ("attn_jax.attention", "attn_jax.nn", "attn_jax.models", "attn_jax")


@functools.cache
def modules() -> dict[str, types.ModuleType]:
    """Public modules by name, the package itself first."""
    found = {"attn_jax": attn_jax}
    for entry in pkgutil.walk_packages(attn_jax.__path__, "attn_jax."):
        parts = entry.name.split(".")
        if not any(part.startswith("_") for part in parts):
            found[entry.name] = importlib.import_module(entry.name)
    return found


def public(module: types.ModuleType) -> list[str]:
    """The names that a module says are public."""
    return list(getattr(module, "__all__", []))


def _written_in(name: str, value: Any, holders: list[str]) -> str:
    """The module of a name: where it is defined, else the innermost that has it."""
    home = getattr(value, "__module__", None)
    if home in modules() and getattr(modules()[home], name, None) is value:
        return str(home)
    return max(holders, key=lambda module: module.count("."))


@functools.cache
def entries() -> dict[str, dict[str, tuple[str, Any]]]:
    """Module -> name -> path to import it by, and what it is.

    Modules that a namespace lists are pages and no entries.
    """
    holders: dict[tuple[str, int], list[str]] = {}
    values: dict[tuple[str, int], Any] = {}
    for module_name, module in modules().items():
        for name in public(module):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                continue
            values[name, id(value)] = value
            holders.setdefault((name, id(value)), []).append(module_name)
    found: dict[str, dict[str, tuple[str, Any]]] = {}
    for (name, _), value in values.items():
        held = holders[name, id(value)]
        home = _written_in(name, value, held)
        spaces = [
            space
            for space in NAMESPACES
            if (home.startswith(f"{space}.") or home == space)
            and getattr(modules()[space], name, None) is value
        ]
        path = f"{(spaces or [home])[0]}.{name}"
        found.setdefault(home, {})[name] = path, value
    return {home: found[home] for home in modules() if home in found}


def paths() -> dict[int, str]:
    """By the identity of what is public, its path; to link to it."""
    return {id(v): path for names in entries().values() for path, v in names.values()}


def markdown(docstring: str) -> str:
    """A module's docstring as Markdown: arguments as a list, examples as code.

    >>> print(markdown("Args:\\n  x: [T],\\n    long."))
    Args:
    <BLANKLINE>
    * x: [T],
      long.
    """
    lines, example, listed = [], False, False
    for line in docstring.splitlines():
        if line.lstrip().startswith(">>>") and not example:
            lines += ["", "```pycon"]
            example = True
        elif example and not line.strip():
            lines.append("```")
            example = False
        item = re.match(r"  (?=\S)", line)
        if example:
            lines.append(line.strip())
        elif item:
            if not listed and lines and lines[-1].strip():
                lines.append("")
            lines.append(f"* {line.strip()}")
            listed = True
        elif listed and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            if listed and line.strip():
                lines.append("")
            lines.append(line)
            listed = False
    return "\n".join([*lines, "```"] if example else lines).strip()


def _restructured(text: str) -> str:
    """A line of prose of a docstring as reStructuredText."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*|\\])|(?<=\w)(_)(?=\W|$)", r"\\\1\2", part)
        elif not part.startswith("``"):
            inside = part[1:-1]
            plain = re.fullmatch(r"[\w.]+", inside)
            parts[i] = f":py:obj:`{inside}`" if plain else f"``{inside}``"
            after = parts[i + 1][:1]
            if after.isalnum():
                parts[i] += "\\ "
    return "".join(parts)


def _joined(lines: list[str]) -> list[str]:
    """Lines, with a span of code that goes over the end of one on a single line."""
    made: list[str] = []
    for line in lines:
        if made and not made[-1].lstrip().startswith(">>>"):
            if made[-1].replace("``", "").count("`") % 2 and line.strip():
                made[-1] += f" {line.strip()}"
                continue
        made.append(line)
    return made


def _list_table(found: re.Match[str]) -> str:
    """A Markdown table as one of reStructuredText."""
    joined = re.sub(r"\n *(?!\s*\|)", " ", found[0].strip())
    rows = [line.strip() for line in joined.splitlines()]
    before = found[0][: len(found[0]) - len(found[0].lstrip())]
    made = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        if not re.fullmatch(r"[|\s:-]+", row):
            head, *others = (cell.strip() for cell in row.strip("|").split(" | "))
            made += [f"   * - {head}", *(f"     - {cell}" for cell in others)]
    return "".join(f"{before}{line}".rstrip() + "\n" for line in ["", *made, ""])


def restructure(lines: list[str]) -> None:
    """Docstrings are Markdown of sorts: what reStructuredText would misread, mended.

    >>> lines = ["Scores |q| of `key`s, see `a b`.", ">>> 2 * x"]
    >>> restructure(lines)
    >>> lines[0]
    'Scores \\\\|q\\\\| of :py:obj:`key`\\\\ s, see ``a b``.'
    """
    text = "\n".join(_joined(lines))
    # A row may go on in a line that only ends in a bar.
    row = r"^ *\|.*(?:\n(?! *\|).+\|$)?\n?"
    text = re.sub(rf"(?:{row})+", _list_table, text, flags=re.MULTILINE)
    made, example = [], False
    for line in text.split("\n"):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        table = re.match(r" *(?:\.\. |:|\* - |  - )", line)
        indent, text = (table[0], line[table.end() :]) if table else ("", line)
        made.append(line if example else indent + _restructured(text))
    lines[:] = made


def _said_of(name: str, module: types.ModuleType) -> str:
    """The string below an assignment in a module's source, or nothing."""
    body = ast.parse(inspect.getsource(module)).body
    for node, below in itertools.pairwise(body):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(getattr(target, "id", None) == name for target in targets):
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                return inspect.cleandoc(str(below.value.value))
    return ""


def _directive(path: str, value: Any, module: types.ModuleType) -> list[str]:
    """What makes Sphinx write of a name."""
    if inspect.isclass(value):
        members = ["   :members:", "   :special-members: __call__"]
        return [f".. autoclass:: {path}", *members]
    if callable(value) and hasattr(value, "__qualname__"):
        return [f".. autofunction:: {path}"]
    said = _said_of(path.rpartition(".")[2], module).splitlines()
    if isinstance(value, (Mapping, tuple, list, set, frozenset)):
        said += ["", f"It has: {', '.join(f'``{entry}``' for entry in value)}."]
        if not all(isinstance(entry, str) for entry in value):
            said[-1] = f"It has {len(value)} entries."
    else:
        said += ["", f"``{value!r}``"]
    restructure(said)
    return [f".. py:data:: {path}", "", *(f"   {line}".rstrip() for line in said)]


def _page(name: str) -> str:
    """The page of a module."""
    module = modules()[name]
    found = entries().get(name, {})
    here = {path for path, _ in found.values()}
    parts = [f"# {name}", markdown(inspect.getdoc(module) or "")]
    known, rows = paths(), []
    for other in public(module):
        value = getattr(module, other)
        if isinstance(value, types.ModuleType):
            rows.append(f"| `{other}` | {{doc}}`{value.__name__}` |")
        elif (path := known[id(value)]) not in here:
            rows.append(f"| `{other}` | {{py:obj}}`{path}` |")
    if rows:
        parts.append("\n".join(["| name | described at |", "|---|---|", *rows]))
    for path, value in found.values():
        directive = _directive(path, value, module)
        parts.append("\n".join(["```{eval-rst}", *directive, "```"]))
    return "\n\n".join(parts) + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of every page of the reference."""
    names = list(modules())
    listed = "\n".join(names)
    yield (
        "reference/index.md",
        f"""# Reference

Every public name of `attn_jax`, from its docstring, with a link to its source. What
holds for all attention functions, their arguments and the letters of their shapes,
stands once at {{doc}}`attn_jax.attention`, and for all layers at {{doc}}`attn_jax.nn`.
The examples are run by `make test`.

```{{toctree}}
:maxdepth: 1

{listed}
```
""",
    )
    for name in names:
        yield f"reference/{name}.md", _page(name)


def described(body: str, known: Container[str]) -> str:
    """Links of a source page, by the names under which its things are described.

    viewcode knows a thing by the module or by a package that gives it out, and the
    reference describes it by one of these.

    Args:
      body: a page's HTML.
      known: the names that are described.

    >>> known = {"a.b.Thing.run", "a.b.c.f"}
    >>> described('href="../reference/a.b.c.html#a.b.c.Thing.run"', known)
    'href="../reference/a.b.c.html#a.b.Thing.run"'
    >>> described('href="../reference/a.b.c.html#a.b.f"', known)
    'href="../reference/a.b.c.html#a.b.c.f"'
    """

    def mended(link: re.Match[str]) -> str:
        page, module, name = link.groups()
        parts, said = module.split("."), name.split(".")
        same = [one == other for one, other in zip(parts, said, strict=False)]
        rest = said[([*same, False]).index(False) :]
        homes = [parts[:n] for n in range(len(parts), 0, -1)]
        names = [name, *(".".join([*home, *rest]) for home in homes)]
        return f"{page}#{next((n for n in names if n in known), name)}"

    return re.sub(r"(reference/([\w.]+)\.html)#([\w.]+)", mended, body)
