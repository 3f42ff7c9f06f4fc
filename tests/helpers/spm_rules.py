"""SentencePiece's compiled rules of normalisation, built from a table: what a T5's tokenizer.json holds."""

import struct

RULES = {
    "½": "1⁄2",
    "ﬁ": "fi",
    "Ａ": "A",
    "\u3000": " ",
    "\u00a0": " ",
    "\u200b": " ",
    "\t": " ",
    "\n": " ",
    "\u0301": "",
    "é": "é",
    "e\u0301": "é",
    "㍿": "株式会社",
    "…": "...",
    "\U0001d400": "A",
}


def compiled(rules: dict[str, str]) -> bytes:
    """The double-array trie over the bytes of what is replaced, then the replacements.

    A unit has in bits 0-7 the byte that leads to it, in bit 8 whether a rule ends there, from bit 10 on what the places
    of its children are xored with.
    """
    texts, start = b"", {}
    for source, target in rules.items():
        start[source.encode()] = len(texts)
        texts += target.encode() + b"\0"
    units: dict[int, int] = {0: 0}
    bases: set[int] = set()

    def place(at: int, prefix: bytes) -> None:
        longer = {key[len(prefix)] for key in start if key.startswith(prefix) and len(key) > len(prefix)}
        labels = sorted(longer | ({0} if prefix in start else set()))
        base = next(b for b in range(1, 2**16) if b not in bases and not any(b ^ label in units for label in labels))
        bases.add(base)
        units[at] |= (base ^ at) << 10 | (prefix in start) << 8
        for label in labels:
            units[base ^ label] = label if label else 0x80000000 | start[prefix]
        for label in longer - {0}:
            place(base ^ label, prefix + bytes([label]))

    place(0, b"")
    array = [units.get(i, 0) for i in range(max(units) + 1)]
    array += [0] * (-len(array) % 256)
    return struct.pack("<I", 4 * len(array)) + struct.pack(f"<{len(array)}I", *array) + texts
