"""Check a converted model: ``sa3 verify``."""
