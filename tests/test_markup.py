"""Text of others stays text: in Markdown (as CommonMark and GitHub read it), in code, in CSV."""

import ast
import csv
import io
import json

import pytest
from markdown_it import MarkdownIt

from edgedit_hf.markup import code, csv_cell, fenced, markdown, one_line, quoted

NAMES = [
    *(
        "plain",
        "](javascript:x)|<b>",
        "[x](http://evil)",
        "![x](y)",
        "<script>alert(1)</script>",
        "a|b|c",
        "`c` ``d``",
        "`",
        "*a* **b** _c_ __d__ ~~e~~",
    ),
    *(
        "# a",
        "- a",
        "1. a",
        "+ a",
        "= a",
        "> a",
        "---",
        "a\n---\nb",
        "a\n\n# b",
        "```\nx\n```",
        "a\\",
        "\\",
        "&lt;b&gt; &amp; &copy;",
        "$x$",
        "[a]: http://b",
        "  x  ",
    ),
    *("{{ 7*7 }}", "a\r\nb", "a\x00b", "a\u2028b", "https-like//x", "~~~", "\ud800", "naïve 名前"),
]


def parsed(text: str):
    """Tokens of a page, those inside of lines included."""
    found = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    return [token for block in found for token in (block, *(block.children or []))]


def words(text: str) -> str:
    return " ".join(one_line(text).split())


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_read_as_it_stands(name):
    for page in (
        f"Text {markdown(name)} text.",
        f"# {markdown(name)}",
        f"{markdown(name)} begins",
        f"| {markdown(name)} | 2 |\n|---|---|\n| 1 | {markdown(name)} |",
    ):
        tokens = parsed(page)
        said = [
            words("".join(part.content for part in token.children if part.type == "text"))
            for token in tokens
            if token.type == "inline"
        ]
        kinds = {token.type.removesuffix("_open") for token in tokens if token.type.endswith("_open")}
        assert kinds <= {"paragraph", "heading", "table", "thead", "tbody", "tr", "th", "td"} and not any(
            token.type.startswith(("html", "image")) for token in tokens
        )
        assert all(words(name) in line for line in said if len(line) > 1), (page, said)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_code_and_literals_hold_the_name(name):
    for page in (f"a {code(name)} b", f"| {code(name)} | 2 |\n|---|---|"):
        spans = [token.content for token in parsed(page) if token.type == "code_inline"]
        assert [words(span).replace("\\|", "|") for span in spans] == [words(name)]
    (block,) = [token for token in parsed(f"a\n\n{fenced(name, 'yaml')}\n\n# b") if token.type == "fence"]
    assert block.info == "yaml" and block.content.rstrip("\n") == MarkdownIt().parse(f"~~~~~~\n{name}\n~~~~~~")[
        0
    ].content.rstrip("\n")
    assert json.loads(quoted(name)) == name and "\n" not in quoted(name)
    assert ast.literal_eval(quoted("a\"b'\\n")) == "a\"b'\\n"


def test_no_cell_is_a_formula():
    cells = ["=1+1", "+1", "-1", "@x", "\t=1", "|x", "plain", -0.5, 3, "a=b", ""]
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(cell) for cell in cells])
    assert next(csv.reader(io.StringIO(file.getvalue()))) == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@x",
        "'\t=1",
        "'|x",
        "plain",
        "-0.5",
        "3",
        "a=b",
        "",
    ]
