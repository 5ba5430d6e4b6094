"""Sequence to sequence: the model decides itself how many labels there are."""
