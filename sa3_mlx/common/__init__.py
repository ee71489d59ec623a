"""Hold the facts that twins, converter and benchmarks share: numpy and plain Python only.

Nothing here imports mlx, torch or any other part of sa3.
"""
