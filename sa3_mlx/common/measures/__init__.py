"""Measure sound, in numpy: what was made, and how far it is from something else."""
