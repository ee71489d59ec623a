"""Facts shared by both twins, the converter and the benchmarks: numpy and plain Python only.

Nothing here imports mlx, torch or any other part of sa3.
"""
