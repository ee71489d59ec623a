"""Serve the native interface under /api."""
