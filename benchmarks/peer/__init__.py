"""Beside the official MLX port."""
