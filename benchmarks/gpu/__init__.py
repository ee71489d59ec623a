"""Measure an NVIDIA GPU in nine minutes: ``python -m benchmarks gpu``."""
