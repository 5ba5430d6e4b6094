"""`python -m experiments.long_range`."""

import sys

from experiments.core.run import entry

main = entry("long_range")

if __name__ == "__main__":
    sys.exit(main())
