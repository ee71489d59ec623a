"""Measure generated sounds by functions of arrays."""
