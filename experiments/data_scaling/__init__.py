"""Accuracy on a fixed test set as the training set grows."""
