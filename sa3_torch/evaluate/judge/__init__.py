"""Judge demo sounds."""
