"""``python -m sa3_mlx`` is the ``sa3`` command."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
