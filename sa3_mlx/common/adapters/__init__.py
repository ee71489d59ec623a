"""The adapter file format, and what a set of adapters does to a model."""
