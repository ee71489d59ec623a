"""Tune models on the grid of their quantization."""
