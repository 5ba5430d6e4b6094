"""`python -m experiments.sequence_labelling`."""

import sys

from experiments.core.run import entry

main = entry("sequence_labelling")

if __name__ == "__main__":
    sys.exit(main())
