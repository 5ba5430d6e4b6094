"""`python -m experiments.data_scaling`."""

import sys

from experiments.core.run import entry

main = entry("data_scaling")

if __name__ == "__main__":
    sys.exit(main())
