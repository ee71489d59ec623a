"""Measures of generated sounds as functions of arrays."""
