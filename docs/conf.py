"""Sphinx's settings. `make docs` writes the pages first, see _ext/site_pages.py."""

from __future__ import annotations

import inspect
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

import site_api
from flax import nnx

import attn_jax

project = "attn_jax"
author = "The attn_jax authors"
version = release = attn_jax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "site_math",
]

# Everything that a page needs is in the site.
html_theme = "furo"
html_title = f"attn_jax {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["access.js", "tables.js", "explorer.js"]
html_extra_path = ["_build/extra"]
html_show_sourcelink = False
html_show_copyright = False  # the licence says it
html_copy_source = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Reports, written for a repository, begin where they like.
suppress_warnings = ["myst.header"]

default_role = "py:obj"  # a name that is known becomes a link, any other is shown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# As it stands: a colon in it does not set a type apart.
napoleon_custom_sections = ["Returns"]
smartquotes_action = "D"  # dashes; quotes as they are typed


def _docstring(app: Any, what: str, name: str, value: Any, *others: Any) -> None:
    site_api.restructure(others[1])  # the first are options


def _signature(
    app: Any, what: str, name: str, value: Any, *others: Any
) -> tuple[str, str] | None:
    """A Flax module is made by its `__init__`, whatever its metaclass takes."""
    if not (inspect.isclass(value) and issubclass(value, nnx.Module)):
        return None
    made = inspect.signature(value.__init__)
    rest = [p for p in made.parameters.values() if p.name != "self"]
    return str(made.replace(parameters=rest, return_annotation=made.empty)), ""


def _skipped(app: Any, what: str, name: str, value: Any, *others: Any) -> bool | None:
    """Fields of a named tuple say nothing that its docstring does not."""
    return True if type(value).__name__ == "_tuplegetter" else None


def _source(app: Any, page: str, template: str, context: Any, tree: Any) -> None:
    """A page of source leads back to where its names are described."""
    if page.startswith("_modules/"):
        known = app.env.get_domain("py").objects
        context["body"] = site_api.described(context["body"], known)


def setup(app: Any) -> None:
    """Docstrings are mended before napoleon reads them."""
    app.connect("autodoc-process-docstring", _docstring, priority=100)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skipped)
    app.connect("html-page-context", _source)
