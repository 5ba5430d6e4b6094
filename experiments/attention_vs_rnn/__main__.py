"""`python -m experiments.attention_vs_rnn`."""

import sys

from experiments.core.run import entry

main = entry("attention_vs_rnn")

if __name__ == "__main__":
    sys.exit(main())
