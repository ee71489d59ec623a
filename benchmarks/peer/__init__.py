"""Measure beside the official MLX port."""
