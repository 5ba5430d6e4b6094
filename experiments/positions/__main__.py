"""`python -m experiments.positions`."""

import sys

from experiments.core.run import entry

main = entry("positions")

if __name__ == "__main__":
    sys.exit(main())
