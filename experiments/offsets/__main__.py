"""`python -m experiments.offsets`."""

import sys

from experiments.core.run import entry

main = entry("offsets")

if __name__ == "__main__":
    sys.exit(main())
