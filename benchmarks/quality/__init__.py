"""Measure quality."""
