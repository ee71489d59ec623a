"""Measure quality of the demo model, precision, latency and memory."""
