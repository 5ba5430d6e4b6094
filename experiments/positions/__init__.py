"""Position encodings compared by what they are said to be good for."""
