"""Equations as MathML, made at the build: a page needs no script and no network.

The converter is the one that docutils, on which Sphinx stands, brings along.
"""

from __future__ import annotations

from typing import Any

from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx


def _inline(visitor: Any, node: Any) -> None:
    visitor.body.append(tex2mathml(node.astext()))
    _skip()


def _display(visitor: Any, node: Any) -> None:
    visitor.body.append(tex2mathml(node.astext(), as_block=True))
    _skip()


def _skip() -> None:
    from docutils import nodes

    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer, which conf.py names."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
