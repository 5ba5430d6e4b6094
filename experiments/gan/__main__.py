"""`python -m experiments.gan`."""

import sys

from experiments.core.run import entry

main = entry("gan")

if __name__ == "__main__":
    sys.exit(main())
