"""Graph neural networks are attention on edges."""
