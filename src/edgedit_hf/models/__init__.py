"""Models: each is one self-contained file that ships to the Hub as it is. Imported when used."""

from typing import Any

__all__ = ["EdgeDiTTransformer2DModel"]


def __getattr__(name: str) -> Any:
    if name == "EdgeDiTTransformer2DModel":
        from .transformer_edgedit import EdgeDiTTransformer2DModel

        return EdgeDiTTransformer2DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
