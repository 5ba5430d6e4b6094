"""Every vector gets a label: from one vector by itself to self-attention."""
