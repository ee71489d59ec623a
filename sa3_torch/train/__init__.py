"""Training of the PyTorch twin, one file per stage."""
