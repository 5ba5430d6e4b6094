"""Pictures drawn by two players with self-attention, or with convolutions alone."""
