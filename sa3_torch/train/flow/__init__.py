"""Stage 1: flow matching."""
