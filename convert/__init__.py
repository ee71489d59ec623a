"""Convert official checkpoints and adapters to ours and back; numpy is enough."""

from .adapters import open_adapter, write_official_adapter
from .official import convert, export_official
from .report import Report

__all__ = ["Report", "convert", "export_official", "open_adapter", "write_official_adapter"]
