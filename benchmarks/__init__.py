"""Measurements: quality of the demo model, latency, and the judge that scores sounds."""
