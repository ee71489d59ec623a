"""What comes with the package: the demo model."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"  # a checkpoint folder: Pipeline.load(DEMO)
