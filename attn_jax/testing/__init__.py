"""The conformance kit: is what an attention function claims about itself true?

`check` tries any function that keeps the contract, built-in or in a file of your own,
and tells with evidence which of its claims hold; `assert_conforms` is the same for a
test of yours:

    from attn_jax.testing import assert_conforms

    def test_mine():
        assert_conforms("mine.py:attend", claims="key_mask,causal,time=O(T)")

On a command line: `python -m attn_jax check mine.py:attend`. What is claimed and not
said is read from the function: see `check`.
"""

from attn_jax.testing.claims import CLAIMS, claimed, growth
from attn_jax.testing.outcome import Fault, Finding, NotApplicable
from attn_jax.testing.report import CHECKS, Report, Row, assert_conforms, check, table
from attn_jax.testing.trial import Trial, quick_compile

__all__ = [
    "CHECKS",
    "CLAIMS",
    "Fault",
    "Finding",
    "NotApplicable",
    "Report",
    "Row",
    "Trial",
    "assert_conforms",
    "check",
    "claimed",
    "growth",
    "quick_compile",
    "table",
]
