"""`python -m experiments.graphs`."""

import sys

from experiments.core.run import entry

main = entry("graphs")

if __name__ == "__main__":
    sys.exit(main())
