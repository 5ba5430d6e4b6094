"""`python -m experiments.pretraining`."""

import sys

from experiments.core.run import entry

main = entry("pretraining")

if __name__ == "__main__":
    sys.exit(main())
