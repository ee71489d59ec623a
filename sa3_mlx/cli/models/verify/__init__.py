"""``sa3 verify``."""
