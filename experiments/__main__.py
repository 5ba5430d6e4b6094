"""`python -m experiments` lists the experiments; with a name it runs one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attn_jax._program import program


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Lists, runs, or with ``NAME --redraw FOLDER`` redraws; the exit status."""
    from experiments.core import run
    from experiments.core.report import redraws

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n\n{run.overview()}")
        return 0
    name, *rest = arguments
    try:
        found = run.find(name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "--redraw" in rest:
        rest.remove("--redraw")
        return redraws(found.report.write)(rest)
    return run.main(name, rest)


if __name__ == "__main__":
    sys.exit(main())
