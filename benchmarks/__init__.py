"""Measurements: quality of the demo model, precision, latency, memory."""
