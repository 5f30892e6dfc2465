"""How good samples are, and of which weights a figure is."""
