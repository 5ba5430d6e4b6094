"""`python -m experiments.attention_as_conv`."""

import sys

from experiments.core.run import entry

main = entry("attention_as_conv")

if __name__ == "__main__":
    sys.exit(main())
