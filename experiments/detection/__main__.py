"""`python -m experiments.detection`."""

import sys

from experiments.core.run import entry

main = entry("detection")

if __name__ == "__main__":
    sys.exit(main())
