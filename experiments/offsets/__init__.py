"""What lies some places away, by a window and by self-attention."""
