"""The judge of the demo sounds."""
