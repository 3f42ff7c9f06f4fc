"""Pipelines: each, with `call.py` put into it, is one self-contained file that ships to the Hub. Imported when used."""

from typing import Any

__all__ = ["EdgeDiTPipeline", "ElasticDiTPipeline"]


def __getattr__(name: str) -> Any:
    if name == "EdgeDiTPipeline":
        from .pipeline_edgedit import EdgeDiTPipeline

        return EdgeDiTPipeline
    if name == "ElasticDiTPipeline":
        from .pipeline_elastic_dit import ElasticDiTPipeline

        return ElasticDiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
