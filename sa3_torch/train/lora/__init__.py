"""Adapters by flow matching."""
