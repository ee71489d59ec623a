"""What comes with the package: the demo model, and the base that it was made from, where it is there."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"  # a checkpoint folder: Pipeline.load(DEMO)
DEMO_BASE = Path(__file__).parent / "demo-base"  # without what is the demo's: sa3_mlx/common/embedded.py
