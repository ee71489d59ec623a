"""Hold the commands that make audio."""
