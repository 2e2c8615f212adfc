"""The whole of ETT at miniature scale, on two CPU cores: the demo, its report, and the study of the paper's claims.

A name is loaded when it is first used, so that workers of [`miniature_ett.schedule`] start with what their tasks need.
"""

import importlib

import ett  # noqa: F401 (registers with the Auto classes, in processes that the demo starts, too)

_MODULE_OF = {"run_demo": "demo", "write_report": "report", "run_study": "study", "report_study": "study"}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


__all__ = list(_MODULE_OF)
