"""A loader a data set."""
