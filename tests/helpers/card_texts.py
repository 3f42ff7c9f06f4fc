"""Model cards as others read them, and text of others that must stay text in them."""

import yaml

HOSTILE = (
    "](javascript:x)|<b>*a*`c`\n---\n# title\n```\n[x]: http://evil\r\n| a | b |\n{{ 8123*7919 }} $x$ ~~y~~ __z__ &lt;"
)


STRUCTURE = (
    "html",
    "fence",
    "link",
    "image",
    "heading",
    "em_",
    "strong",
    "s_",
    "bullet",
    "ordered",
    "blockquote",
    "hr",
    "table",
    "code_block",
)


def visible(markdown: str) -> tuple[str, list]:
    """Text of a page as CommonMark reads it, and its tokens of every kind."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
    flat = [token for token in tokens for token in (token, *(token.children or []))]
    return "".join(token.content for token in flat if token.type in ("text", "code_inline", "fence")), flat


def metadata(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])
