"""Text of others (names of models, data, extractors, labels) inside Markdown, code and tables, where it must stay text.
No torch.
"""

from __future__ import annotations

import json
import re
from typing import Any

# What begins or ends emphasis, code, links, images, HTML, table cells, strikethrough or mathematics.
SPECIAL = re.compile(r"[\\`*_\[\]|~$]")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def one_line(text: Any) -> str:
    """A value's text without line breaks and control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", str(text))


def markdown(text: Any) -> str:
    """Plain text in a paragraph, a heading or a cell of a table."""
    escaped = SPECIAL.sub(r"\\\g<0>", re.sub("[&<>]", lambda found: ENTITIES[found[0]], one_line(text)))
    return re.sub(r"^(\s*)([-+#=]|\d+[.)])", lambda found: f"{found[1]}{found[2][:-1]}\\{found[2][-1]}", escaped)


def code(text: Any) -> str:
    """A code span, also in a cell of a table."""
    content = one_line(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{fence} {content} {fence}" if "`" in content else f"{fence}{content}{fence}"


def fenced(text: Any, language: str = "") -> str:
    """A block of code."""
    content = str(text).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{fence}{language}\n{content}\n{fence}"


def quoted(text: Any) -> str:
    """A literal of Python, JSON or Kotlin."""
    return json.dumps(str(text), ensure_ascii=False)


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; numbers stay as they are."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "|", "%"))
        else value
    )


MARKUP = {"markdown": markdown, "code": code, "fenced": fenced, "quoted": quoted}
"""What templates of Markdown call."""
