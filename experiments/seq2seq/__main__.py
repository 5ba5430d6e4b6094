"""`python -m experiments.seq2seq`."""

import sys

from experiments.core.run import entry

main = entry("seq2seq")

if __name__ == "__main__":
    sys.exit(main())
