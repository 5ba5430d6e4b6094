"""What `import attn_jax` loads, and that its public names are what it says.

jax and chex bring packages of their own, and Flax brings more (optax and rich among
them, in the versions seen here). What is asked is therefore a difference: in a fresh
interpreter, attn_jax may add nothing but attn_jax to what its dependencies load.
"""

from __future__ import annotations

import json
import pkgutil
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


def test_no_name_is_a_function_here_and_a_module_there():
    """A module of the library has no name that a public function has."""
    modules = {info.name for info in pkgutil.walk_packages(attn_jax.__path__, "")}
    spaces = (attn_jax, attn_jax.attention, attn_jax.nn, attn_jax.positions)
    for space in (*spaces, attn_jax.masks, attn_jax.inputs, attn_jax.testing):
        for name in dir(space):
            thing = getattr(space, name)
            if callable(thing) and thing.__module__.startswith("attn_jax"):
                assert name not in modules, (space.__name__, name)


def test_every_public_function_and_class_is_documented():
    for space in (attn_jax, attn_jax.attention, attn_jax.nn, attn_jax.positions):
        for name in getattr(space, "__all__", None) or vars(space):
            thing = getattr(space, name)
            ours = getattr(thing, "__module__", "").startswith("attn_jax")
            if callable(thing) and ours and not name.startswith("_"):
                first = (thing.__doc__ or " ")[0]
                assert first in "`" + string.ascii_uppercase, name


def test_package_says_that_it_is_typed():
    assert Path(attn_jax.__file__).with_name("py.typed").is_file()
