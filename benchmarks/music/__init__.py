"""Measure what makes music of sounds."""
