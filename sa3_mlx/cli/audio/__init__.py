"""Commands that make audio."""
