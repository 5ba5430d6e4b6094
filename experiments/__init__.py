"""Research programs on real data: ``python -m experiments.<name> --help``."""
