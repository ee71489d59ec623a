"""Predict what a run needs of a machine's memory, and what an Apple GPU may keep."""
