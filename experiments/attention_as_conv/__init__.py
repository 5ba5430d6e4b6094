"""Self-attention that places its heads, against the convolution it can express."""
