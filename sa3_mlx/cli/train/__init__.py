"""Hold the commands around training; the stages themselves are in ``sa3_torch.train``."""
