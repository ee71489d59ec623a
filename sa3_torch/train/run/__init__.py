"""The engine: it runs a stage and knows none."""
