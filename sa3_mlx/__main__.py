"""Run the ``sa3`` command by ``python -m sa3_mlx``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
