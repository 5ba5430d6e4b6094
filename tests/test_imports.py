"""What `import attn_jax` loads, and that its public names are what it says.

jax and chex bring packages of their own, and Flax brings more (optax and rich among
them, in the versions seen here). What is asked is therefore a difference: in a fresh
interpreter, attn_jax may add nothing but attn_jax to what its dependencies load.
"""

from __future__ import annotations

import ast
import json
import string
import subprocess
import sys
from pathlib import Path

import pytest

import attn_jax

# Training, data, checkpoints, command lines, plots: none of it belongs to a library
# of functions and layers.
FORBIDDEN = {
    "experiments",
    "benchmarks",
    "matplotlib",
    "orbax",
    "pandas",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "torch",
    "tyro",
}


# The packages loaded after each statement, in one fresh interpreter.
STATEMENTS = (
    "import jax, chex, numpy",
    "import attn_jax",
    "import flax.nnx, flax.linen",
    "from attn_jax import *",
)


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """For each statement, the third-party top-level packages that it added."""
    code = "import json, sys\n" + "".join(
        f"{statement}\nprint(json.dumps(list(sys.modules)))\n"
        for statement in STATEMENTS
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    added, before = {}, set(sys.stdlib_module_names)
    for statement, line in zip(STATEMENTS, done.stdout.splitlines(), strict=True):
        after = {name for name in json.loads(line) if "." not in name}
        added[statement] = after - before
        before |= after
    return added


def test_import_adds_nothing_to_jax_and_chex(loaded):
    assert {"jax", "chex", "numpy"} <= loaded["import jax, chex, numpy"]
    assert loaded["import attn_jax"] == {"attn_jax"}
    so_far = loaded["import jax, chex, numpy"] | loaded["import attn_jax"]
    assert not so_far & {*FORBIDDEN, "flax", "optax", "rich"}


def test_all_public_names_add_nothing_to_flax(loaded):
    """Layers and positions included; Flax itself may load what it likes."""
    assert "flax" in loaded["import flax.nnx, flax.linen"]
    assert loaded["from attn_jax import *"] == set()
    assert not set().union(*loaded.values()) & FORBIDDEN


def test_public_names_exist():
    assert len(set(attn_jax.__all__)) == len(attn_jax.__all__)
    assert set(attn_jax.__all__) <= set(dir(attn_jax))
    for name in attn_jax.__all__:
        assert getattr(attn_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'dot_produkt'"):
        _ = attn_jax.dot_produkt
    with pytest.raises(ImportError, match="dot_produkt"):
        from attn_jax import dot_produkt  # noqa: F401


def test_lazy_names_are_the_ones_told_to_type_checkers():
    tree = ast.parse(Path(attn_jax.__file__).read_text(encoding="utf-8"))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    told: dict[str, tuple[str, ...]] = {}
    modules: tuple[str, ...] = ()
    for node in branch.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        names = tuple(alias.name for alias in node.names)
        if node.module == "attn_jax":
            modules = names
        else:
            told[node.module.removeprefix("attn_jax.")] = names
    assert told == attn_jax._LAZY
    assert set(modules) == {name for name in told if "." not in name}
    public = {name for names in told.values() for name in names} | set(modules)
    assert public <= set(attn_jax.__all__)


def test_every_public_function_and_class_is_documented():
    for name in attn_jax.__all__:
        thing = getattr(attn_jax, name)
        if callable(thing):
            first = (thing.__doc__ or " ")[0]
            assert first in "`" + string.ascii_uppercase, name


def test_package_says_that_it_is_typed():
    assert Path(attn_jax.__file__).with_name("py.typed").is_file()
