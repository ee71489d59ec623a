"""Official checkpoints to ours and back, with numpy alone: ``convert`` and ``export_official``."""

from .official import convert, export_official
from .report import Report

__all__ = ["Report", "convert", "export_official"]
