"""The one exception type that users of the package see for bad input."""

from __future__ import annotations


class EdgeDiTError(ValueError):
    """Input that cannot be used as it is. The message quotes the offending values and says what to do."""
