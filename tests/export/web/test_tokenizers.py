"""The page's tokenizer.js gives the ids of the library `tokenizers`, and what it cannot read is refused at export."""

import functools
import itertools
import json
import random
import unicodedata

import pytest
from flow_pipelines import tokenizer as characters_tokenizer
from node import ask_node, needs_node
from spm_rules import RULES, compiled
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from edgedit_hf.data.digits import STYLES, TEMPLATES, write_caption
from edgedit_hf.elastic.text_encoders import train_tokenizer
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.export.web.tokenizers import check_tokenizer

ODD = [" ", "  ", "\n", "\t", "\r\n", "\u3000", "\u00a0", "\u0085", "\u200b", "\ufeff", "\x00", "é", "e\u0301", "ΣΑΣ"]
ODD += [
    "a\u0301\u0323",
    "İ",
    "ﬁ",
    "½",
    "１２",
    "Ⅻ",
    "ß",
    "ſ",
    "\u212a",
    "don't",
    "I'LL",
    "'ſ",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "👍🏽",
]
ODD += [
    "漢字",
    "かな",
    "각",
    "\u1100\u1161\u11a8",
    "नमस्ते",
    "เขา",
    "שלום",
    "x1y2",
    "1234567",
    "...",
    "…",
    "!?",
    "_",
    "a-b",
]
ODD += ["㍿", "\U0001d400", "▁", "▁a", "<unk>", "<pad>", "</s>", "<eos>", "<bos>", "<|endoftext|>", "<|startoftext|>"]
ODD += ["<|END|>", "<extra_id_0>", "<extra_id_1>", "<start-of-it>", "<0x41>", "seven", "Seven", " ", "a"]
PATTERNS = [  # those of GPT-2, CLIP, Qwen and Llama, and small ones
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"\p{N}{1,3}",
    r".",
    r"\d+?",
    r"[a-e\-_/(]|\!\-",
    r"(?:\S(?= ))",
]
REFUSED_PATTERNS = [
    r"a++",
    r"(?>a)",
    r"(?<n>a)",
    r"(?<=a)b",
    r"\w+",
    r"\bx",
    r"^a",
    r"[[:alpha:]]",
    r"[a&&b]",
    r"(?i:[a-z])",
    r"\h",
]


@functools.cache
def captions() -> tuple[str, ...]:
    """All that can be said of a digit."""
    words = itertools.product(*((None, *ends) for ends in STYLES.values()))
    rest = (range(len(TEMPLATES)), (False, True))
    return tuple(
        write_caption(digit, dict(zip(STYLES, style)), template, numeral)
        for digit, style, template, numeral in itertools.product(range(10), words, *rest)
    )


@functools.cache
def prompts() -> tuple[str, ...]:
    """1,200: captions, random characters of every script, odd things joined, long words.

    The library's tables for NFKC are of an older Unicode than Python's and JavaScript's: 73 characters of after 2018
    are not taken.
    """
    rng, library = random.Random(1), normalizers.NFKD()
    known = [code for code in range(32, 0x30000) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")]
    taken = [code for code in known if library.normalize_str(chr(code)) == unicodedata.normalize("NFKD", chr(code))]
    assert len(known) - len(taken) < 100
    found = ["", " ", "  two  spaces ", "x" * 300, "漢" * 60, "e\u0301" * 40, *rng.sample(captions(), 244)]
    found += ["".join(map(chr, rng.choices(taken, k=rng.randint(1, 30)))) for _ in range(450)]
    found += ["".join(rng.choices(ODD, k=rng.randint(1, 14))) for _ in range(500)]
    return tuple(found)


def trained(model, trainer, **parts) -> dict:
    """The model of tokenizer.json, trained on captions and odd things."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([*captions(), *ODD, *ODD], trainer)
    return json.loads(tokenizer.to_str())["model"]


def bpe(special: list[str], alphabet: bool = True, **options) -> dict:
    """Vocabulary and merges of a BPE."""
    letters = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())} if alphabet else {}
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, **letters, **options)
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)} if alphabet else {}
    model = trained(models.BPE(unk_token=special[0]), trainer, **parts)
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


@functools.cache
def pieces() -> list:
    """The vocabulary of a Unigram, as T5 has it."""
    marked = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special = {"special_tokens": ["<pad>", "</s>", "<unk>"], "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, **special)
    return [tuple(piece) for piece in trained(models.Unigram(), trainer, pre_tokenizer=marked)["vocab"]]


def clip() -> Tokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(**bpe(["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>")).backend_tokenizer


def t5() -> Tokenizer:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=pieces(), _spm_precompiled_charsmap=compiled(RULES)).backend_tokenizer


def gemma() -> Tokenizer:
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return GemmaTokenizer(**bpe(special, alphabet=False)).backend_tokenizer


def qwen() -> Tokenizer:
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(**bpe(["<|endoftext|>"])).backend_tokenizer


def roberta() -> Tokenizer:
    """Byte-level, with tokens around, unknown and added ones of every kind."""
    tokenizer = Tokenizer(
        models.BPE(**bpe(["<unk>", "</s>", "<pad>"]), unk_token="<unk>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Strip(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    around = processors.RobertaProcessing(("</s>", 1), ("<pad>", 2), trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), around])
    tokenizer.add_special_tokens([AddedToken("<extra_id_0>", lstrip=True, rstrip=True), "<start-of-it>"])
    tokenizer.add_tokens([AddedToken("seven", single_word=True), "İ", AddedToken("e\u0301", normalized=False), "a-b"])
    return tokenizer


def unigram(byte_fallback: bool) -> Tokenizer:
    tokens = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] if byte_fallback else []
    tokenizer = Tokenizer(models.Unigram([*pieces(), *tokens], unk_id=2, byte_fallback=byte_fallback))
    spaces, prefix = normalizers.Replace(Regex(" {2,}"), " $1"), normalizers.Prepend("▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces, prefix, normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=byte_fallback)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A </s> <pad>", special_tokens=[("</s>", 1), ("<pad>", 0)]
    )
    return tokenizer


def bare_bpe(fuse: bool) -> Tokenizer:
    """Of characters, of which it lacks most; the bytes of some."""
    some = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(0xC0))]
    words = bpe(some, alphabet=False, continuing_subword_prefix="##")
    tokenizer = Tokenizer(
        models.BPE(**words, unk_token="<unk>", fuse_unk=fuse, byte_fallback=True, continuing_subword_prefix="##")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {
    "the demo's clip": lambda: train_tokenizer(captions(), 400, "clip", 32).backend_tokenizer,
    "the demo's t5": lambda: train_tokenizer(captions(), 400, "t5", 32).backend_tokenizer,
    "clip": clip,
    "t5": t5,
    "gemma": gemma,
    "qwen": qwen,
    "roberta": roberta,
    "unigram": lambda: unigram(False),
    "unigram of bytes": lambda: unigram(True),
    "unknown": lambda: bare_bpe(False),
    "unknown fused": lambda: bare_bpe(True),
    "words": lambda: characters_tokenizer().backend_tokenizer,
}


@needs_node
@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_has_the_librarys_ids(kind, tmp_path):
    tokenizer = KINDS[kind]()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    check_tokenizer(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    asked = [{"tokenizer": content, "texts": prompts(), "specials": specials} for specials in (True, False)]
    assert len(prompts()) == 1200
    for specials, answer in zip((True, False), ask_node(asked)):
        assert isinstance(answer, list), answer
        wrong = []
        for text, found in zip(prompts(), answer):
            expected = tokenizer.encode(text, add_special_tokens=specials).ids
            if found != expected:
                wrong.append((ascii(text), found, expected))
        assert wrong == []
        assert len({token for ids in answer for token in ids}) > 50  # they are no ids of one unknown token


def readable(tokenizer: Tokenizer, folder) -> tuple[bool, str]:
    """Whether the export takes a tokenizer, and the page's script, which must agree; the export's words."""
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    answer = ask_node([{"tokenizer": json.loads(path.read_text(encoding="utf-8")), "texts": [], "specials": True}])[0]
    try:
        check_tokenizer(path)
    except EdgeDiTError as error:
        assert "which this page cannot read" in answer["error"], answer
        return False, str(error)
    assert answer == []
    return True, ""


def small(**parts) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@needs_node
@pytest.mark.parametrize(
    "tokenizer, name",
    [
        (lambda: Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), 'model is "WordPiece"'),
        (lambda: Tokenizer(models.BPE({"a": 0}, [], dropout=0.5)), "dropout is 0.5"),
        (lambda: Tokenizer(models.BPE({"a": 0}, [], unk_token="<unk>")), 'unknown token is "<unk>"'),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")), 'unknown token is "<unk>"'),
        (lambda: Tokenizer(models.Unigram([("a", 0.0)], unk_id=None)), "unknown token is null"),
        (lambda: small(normalizer=normalizers.BertNormalizer()), 'normalizer is "BertNormalizer"'),
        (lambda: small(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Nmt()])), 'normalizer is "Nmt"'),
        (lambda: small(pre_tokenizer=pre_tokenizers.BertPreTokenizer()), 'pre-tokenizer is "BertPreTokenizer"'),
        (lambda: small(pre_tokenizer=pre_tokenizers.Digits()), 'pre-tokenizer is "Digits"'),
    ],
)
def test_other_kinds_are_refused_at_export(tokenizer, name, tmp_path):
    taken, words = readable(tokenizer(), tmp_path)
    assert not taken and name in words and "--format onnx" in words


@needs_node
def test_patterns_are_read_or_refused(tmp_path):
    """Each way of cutting at each pattern, on all prompts."""
    kinds = [
        pre_tokenizers.Split(pattern if pattern == "-" else Regex(pattern), behavior, invert)
        for pattern in (*PATTERNS, "-")
        for behavior in ("isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous")
        for invert in (False, True)
    ]
    texts = prompts()[::6]
    made, asked = [], []
    for kind in kinds:
        words = {word: None for text in texts for word, _ in kind.pre_tokenize_str(text)}
        vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
        made.append(Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))
        made[-1].pre_tokenizer = kind
        asked.append({"tokenizer": json.loads(made[-1].to_str()), "texts": texts, "specials": True})
    for kind, tokenizer, answer in zip(kinds, made, ask_node(asked)):
        assert answer == [tokenizer.encode(text).ids for text in texts], kind
    for pattern in PATTERNS:
        assert readable(small(pre_tokenizer=pre_tokenizers.Split(Regex(pattern), "isolated")), tmp_path) == (True, "")
    for pattern in REFUSED_PATTERNS:
        taken, words = readable(small(pre_tokenizer=pre_tokenizers.Split(Regex(pattern), "isolated")), tmp_path)
        assert not taken and f"pattern is {json.dumps(pattern)}" in words


@needs_node
def test_half_a_pair_of_utf_16_is_one_unknown_character():
    content = json.loads(characters_tokenizer().backend_tokenizer.to_str())
    asked = {"tokenizer": content, "texts": ["a\ud83d", "a\ufffd"], "specials": True}
    assert len(set(map(tuple, ask_node([asked])[0]))) == 1


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(EdgeDiTError, match="does not describe a tokenizer"):
        check_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(EdgeDiTError, match="tokenizer.json"):
        check_tokenizer(tmp_path / "none" / "tokenizer.json")
