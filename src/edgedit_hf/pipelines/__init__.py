"""Pipelines: each is one self-contained file that ships to the Hub as it is. Imported when used."""

from typing import Any

__all__ = ["EdgeDiTPipeline"]


def __getattr__(name: str) -> Any:
    if name == "EdgeDiTPipeline":
        from .pipeline_edgedit import EdgeDiTPipeline

        return EdgeDiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
