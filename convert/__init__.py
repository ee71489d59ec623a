"""Convert official checkpoints and adapters to ours and back; numpy is enough."""

from .adapters import open_adapter, write_official_adapter
from .any_layout import convert
from .official import export_official
from .peft import write_peft
from .port.write import export_port
from .report import Report

__all__ = [
    "Report",
    "convert",
    "export_official",
    "export_port",
    "open_adapter",
    "write_official_adapter",
    "write_peft",
]
