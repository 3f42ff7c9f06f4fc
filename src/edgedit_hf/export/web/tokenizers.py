"""Which tokenizers the page's `tokenizer.js` reads: an export refuses the others, before anybody opens the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ...errors import EdgeDiTError
from ...files import read_json

# Part of tokenizer.json → the kinds of it that are written in tokenizer.js. A Sequence of them is read as well.
READ = {
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Strip", "Precompiled"),
    "pre_tokenizer": ("ByteLevel", "Metaspace", "Split", "WhitespaceSplit"),
    "model": ("BPE", "Unigram", "WordLevel"),
    "post_processor": ("ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing"),
}
_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
# What a regular expression may be made of: the same as in tokenizer.js.
_CLASS = r"\\p\{[LMNPSZC][a-z]?\}|\\[sSdrnt]|\\[^a-zA-Z0-9]|[^\\\[\]&]"
_PATTERN = re.compile(
    rf"(?P<any_case>\(\?i:)|\(\?[:=!]|\\p\{{[LMNPSZC][a-z]?\}}|\\[sSdrnt]|\\[^a-zA-Z0-9]|(?P<class>\[\^?(?:{_CLASS})*\])"
    r"|(?:[?*+]|\{\d+(?:,\d*)?\})\??(?![?*+{])|\((?!\?)|[^\\\[\]{}^$?*+(]"
)


def check_tokenizer(path: str | Path) -> None:
    """Raise unless the page's script reads this tokenizer.json.

    Raises:
        EdgeDiTError: it is not there, is damaged, or has a part of a kind that tokenizer.js does not have; the part is
            named.
    """
    content = read_json(path, "save_pretrained")
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise EdgeDiTError(f"{path} does not describe a tokenizer; save it again with save_pretrained.")
    for name, kinds in READ.items():
        for part in _parts(content.get(name), _LISTS.get(name)):
            if part.get("type") not in kinds:
                _refuse(path, name, part.get("type"), f"of {name}s it reads {', '.join(kinds)}")
            pattern = part.get("pattern")
            if isinstance(pattern, dict) and not _readable(pattern):
                _refuse(path, "pattern", pattern.get("Regex", pattern), "its pattern has something it does not know")
    model = content["model"]
    if model.get("dropout") is not None:
        _refuse(path, "dropout", model["dropout"], "it drops no merges")
    if not _has_unknown(model):
        unknown = model.get("unk_id" if model["type"] == "Unigram" else "unk_token")
        _refuse(path, "unknown token", unknown, "its vocabulary must hold that token")


def _parts(part: Any, several: str | None) -> Iterator[Mapping[str, Any]]:
    """A part of tokenizer.json; of a Sequence its parts."""
    if isinstance(part, dict) and part.get("type") == "Sequence" and several is not None:
        for one in part[several]:
            yield from _parts(one, several)
    elif part is not None:
        yield part


def _has_unknown(model: Mapping[str, Any]) -> bool:
    """Whether it has a token for what it does not know; a BPE that names none leaves it out."""
    if model["type"] == "Unigram":
        return model.get("unk_id") is not None
    named: str | None = model.get("unk_token")
    return named in model["vocab"] or (model["type"] == "BPE" and named is None)


def _readable(pattern: Mapping[str, Any]) -> bool:
    """Whether tokenizer.js reads a pattern of tokenizer.json."""
    if "String" in pattern:
        return True
    source, at = pattern.get("Regex", ""), 0
    groups: list[bool] = []  # of every open group, whether letters of any case match in it
    while at < len(source):
        found = _PATTERN.match(source, at)
        if found is None or (found["class"] and any(groups[-1:])):
            return False
        if found[0].startswith("("):
            groups.append(bool(found["any_case"]) or any(groups[-1:]))
        elif found[0] == ")" and groups:
            groups.pop()
        at = found.end()
    return "Regex" in pattern


def _refuse(path: str | Path, part: str, value: Any, reads: str) -> NoReturn:
    raise EdgeDiTError(
        f"The web page cannot read the tokenizer {path}: its {part.replace('_', '-')} is {json.dumps(value)}, but "
        f"{reads}. Export with --format onnx, whose sample_min.py reads every tokenizer, or use a text encoder with "
        "another one."
    )
