"""PyTorch twin of sa3_mlx: the same model files, plus every training stage under ``sa3_torch.train``.

Never imports mlx; shared facts come from ``sa3_mlx.spec`` (numpy only).
"""
