"""Detection with self-attention: sets of boxes, matched to what is there."""
