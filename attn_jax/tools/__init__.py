"""Counting cost, timing, theorems: programs about variants."""
