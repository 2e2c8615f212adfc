"""The whole of ETT at miniature scale, on two CPU cores: the demo and its report."""

import ett  # noqa: F401 (registers with the Auto classes, in processes that the demo starts, too)

from .demo import run_demo
from .report import write_report

__all__ = ["run_demo", "write_report"]
