"""Describe adapters, their files, and what a set of them does to a model."""
