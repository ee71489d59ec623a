"""Quantization-aware tuning."""
