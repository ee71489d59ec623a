"""Measure everything that only a Mac can tell, in one command."""
