"""Find the fastest ways on this machine: ``sa3 tune``."""
