"""The models of the experiments in PyTorch: the same parameters, the same loss."""
