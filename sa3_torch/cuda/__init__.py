"""Keep a CUDA device at work: copies that nobody waits for, times of its own clock, graphs of kernels."""
