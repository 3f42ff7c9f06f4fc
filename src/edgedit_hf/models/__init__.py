"""Models: each is one self-contained file that ships to the Hub as it is. Imported when used."""

from typing import Any

__all__ = ["EdgeDiTTransformer2DModel", "ElasticDiTTransformer2DModel"]


def __getattr__(name: str) -> Any:
    if name == "EdgeDiTTransformer2DModel":
        from .transformer_edgedit import EdgeDiTTransformer2DModel

        return EdgeDiTTransformer2DModel
    if name == "ElasticDiTTransformer2DModel":
        from .transformer_elastic_dit import ElasticDiTTransformer2DModel

        return ElasticDiTTransformer2DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
