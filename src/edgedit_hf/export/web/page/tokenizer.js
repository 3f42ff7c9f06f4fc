// Text to token ids by a tokenizer.json of the library `tokenizers`, as sample_min.py reads it: no padding, and no
// truncation, which is the caller's. It reads what text encoders use: byte-level, CLIP's and Gemma's BPE, T5's Unigram,
// whole words; anything else is an error when it is loaded. export/web/tokenizers.py refuses the same at export.

/** Whitespace as Unicode has it. JavaScript's own \s has U+FEFF and lacks U+0085. */
const SPACE = "\\p{White_Space}";
/** A letter, digit or mark, as \w of the library. */
const WORD = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;
/** How GPT-2 and its heirs cut a text, in the form of tokenizer.json. */
const BYTE_LEVEL = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;
/** What a Unigram model takes off for a character that it lacks. */
const UNKNOWN_PENALTY = 10;

const bytesOf = (text) => new TextEncoder().encode(text);
const byteToken = (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");

function refuse(what, value) {
  throw new Error(`The tokenizer has the ${what} ${JSON.stringify(value)}, which this page cannot read.`);
}

/** The function of a part of tokenizer.json by its type; a Sequence is its parts, one after the other. */
function partOf(what, kinds, part, list) {
  if (part == null) return (value) => value;
  if (part.type === "Sequence") {
    const steps = part[list].map((one) => partOf(what, kinds, one, list));
    return (value) => steps.reduce((found, step) => step(found), value);
  }
  if (!Object.hasOwn(kinds, part.type)) refuse(what, part.type);
  return kinds[part.type](part);
}

// ---------------------------------------------------------------- patterns

// What a pattern of tokenizer.json (Oniguruma's language) may be made of, and what a character class of it.
const IN_CLASS = /\\p\{[LMNPSZC][a-z]?\}|\\[sSdrnt]|\\[^a-zA-Z0-9]|[^\\[\]&]/uy;
const OUTSIDE = /\(\?i:|\(\?[:=!]|\\p\{[LMNPSZC][a-z]?\}|\\[sSdrnt]|\\[^a-zA-Z0-9]|\[\^?|(?:[?*+]|\{\d+(?:,\d*)?\})\??(?![?*+{])|\((?!\?)|[^\\[\]{}^$?*+(]/uy;

/** One token of a pattern in JavaScript's language. */
function translated(token, inClass, anyCase) {
  if (token === "\\s") return SPACE;
  if (token === "\\S") return "\\P{White_Space}";
  if (token === "\\d") return "\\p{Nd}";
  if (/^\\[^a-zA-Z0-9]$/u.test(token)) return inClass && token[1] === "-" ? token : escaped(token[1]);
  if (inClass) return /^[()[\]{}/|]$/.test(token) ? `\\${token}` : token;
  if (token === ".") return "[^\\n]";
  if (token === "(?i:") return "(?:";
  if (token === "/") return "\\/";
  if (!anyCase || !/^[a-zA-Z]$/.test(token)) return token;
  const [small, large] = [token.toLowerCase(), token.toUpperCase()];
  return `[${small}${large}${{ s: "\u017f", k: "\u212a" }[small] ?? ""}]`; // the long s and the Kelvin sign fold too
}

/** A pattern as a regular expression: {String: …} is meant literally, {Regex: …} in Oniguruma's language. */
function patternOf(pattern) {
  if (pattern.String !== undefined) return new RegExp(escaped(pattern.String), "gu");
  const source = pattern.Regex ?? refuse("pattern", pattern);
  let [found, inClass, at] = ["", false, 0];
  const groups = []; // of every open group, whether letters of any case match in it
  while (at < source.length) {
    const kind = inClass ? IN_CLASS : OUTSIDE;
    const anyCase = groups.at(-1) ?? false;
    kind.lastIndex = at;
    let token = kind.exec(source)?.[0];
    if (inClass && source[at] === "]") [token, inClass] = ["]", false];
    else if (token === undefined || (inClass && anyCase)) refuse("pattern", source);
    else if (!inClass && token[0] === "(") groups.push(token === "(?i:" || anyCase);
    else if (!inClass && token === ")") groups.pop();
    else if (!inClass && token[0] === "[") inClass = true;
    else token = translated(token, inClass, anyCase);
    found += token === "(?i:" ? "(?:" : token;
    at += kind.lastIndex > at ? kind.lastIndex - at : 1;
  }
  try {
    return new RegExp(found, "gu");
  } catch {
    return refuse("pattern", source);
  }
}

// ---------------------------------------------------------------- normalizers: text to text

/** SentencePiece's rules, a double-array trie over bytes: [shortest prefix that has a rule] → what replaces the whole. */
function charsMap(base64) {
  const data = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const view = new DataView(data.buffer);
  const size = view.getUint32(0, true);
  const unit = (index) => (4 * index < size ? view.getUint32(4 + 4 * index, true) : 0);
  const offset = (value) => (value >>> 10) << ((value & 0x200) >>> 6);
  return (text) => {
    let place = offset(unit(0));
    for (const byte of bytesOf(text)) {
      if (byte === 0) break;
      place ^= byte;
      const value = unit(place);
      if ((value & 0x800000ff) >>> 0 !== byte) break;
      place ^= offset(value);
      if (value & 0x100) {
        const start = 4 + size + (unit(place) & 0x7fffffff);
        return new TextDecoder().decode(data.subarray(start, data.indexOf(0, start)));
      }
    }
    return null;
  };
}

function precompiled(part) {
  const rule = charsMap(part.precompiled_charsmap);
  const graphemes = new Intl.Segmenter("en", { granularity: "grapheme" });
  return (text) => {
    let found = "";
    for (const { segment } of graphemes.segment(text)) {
      const whole = bytesOf(segment).length < 6 ? rule(segment) : null; // the library looks up no longer ones
      found += whole ?? Array.from(segment, (character) => rule(character) ?? character).join("");
    }
    return found;
  };
}

const unicode = (part) => (text) => text.normalize(part.type);
const NORMALIZERS = {
  NFC: unicode,
  NFD: unicode,
  NFKC: unicode,
  NFKD: unicode,
  // Each character by itself: of a whole word JavaScript would make the last sigma another one.
  Lowercase: () => (text) => Array.from(text, (character) => character.toLowerCase()).join(""),
  Prepend: (part) => (text) => (text ? part.prepend + text : text),
  Replace: (part) => {
    const pattern = patternOf(part.pattern);
    return (text) => text.replace(pattern, () => part.content);
  },
  Strip: (part) => {
    const ends = [part.strip_left ? `^${SPACE}+` : [], part.strip_right ? `${SPACE}+$` : []].flat().join("|");
    return (text) => (ends ? text.replace(new RegExp(ends, "gu"), "") : text);
  },
  Precompiled: precompiled,
};

// ---------------------------------------------------------------- pre-tokenizers: pieces to pieces
// A piece is {text, first}: whether it begins the whole text.

/** Cut a text at the matches of a pattern: the parts, and of each whether it is a match (`invert`: whether it is none). */
function cut(text, pattern, invert) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    if (match.index > end) parts.push([text.slice(end, match.index), invert]);
    if (match[0]) parts.push([match[0], !invert]);
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push([text.slice(end), invert]);
  return parts;
}

/** Join every match to the part before it, unless that is a match as well. */
function joinedToPrevious(parts, join) {
  const found = [];
  let previous = false;
  for (const [text, match] of parts) {
    if (match && !previous && found.length) found.push(join(found.pop(), text));
    else found.push(text);
    previous = match;
  }
  return found;
}

const BEHAVIORS = {
  Isolated: (parts) => parts.map(([text]) => text),
  Removed: (parts) => parts.filter(([, match]) => !match).map(([text]) => text),
  MergedWithPrevious: (parts) => joinedToPrevious(parts, (before, text) => before + text),
  MergedWithNext: (parts) => joinedToPrevious(parts.reverse(), (after, text) => text + after).reverse(),
  Contiguous: (parts) => {
    const found = [];
    parts.forEach(([text, match], i) => {
      if (i && parts[i - 1][1] === match) found.push(found.pop() + text);
      else found.push(text);
    });
    return found;
  },
};

/** A pre-tokenizer of a function from one piece to the texts it becomes. */
const eachPiece = (change) => (pieces) =>
  pieces.flatMap((piece) => {
    const texts = change(piece).filter(Boolean);
    return texts.map((text, i) => ({ text, first: piece.first && i === 0 }));
  });

/** The characters that stand for the 256 bytes: printable ones for themselves, the others for what follows U+0100. */
function byteLetters() {
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
}

const PRE_TOKENIZERS = {
  ByteLevel: (part) => {
    const [letters, pattern] = [byteLetters(), patternOf({ Regex: BYTE_LEVEL })];
    return eachPiece(({ text }) => {
      const spaced = part.add_prefix_space && !text.startsWith(" ") ? ` ${text}` : text;
      const words = (part.use_regex ?? true) ? cut(spaced, pattern, false).map(([word]) => word) : [spaced];
      return words.map((word) => Array.from(bytesOf(word), (byte) => letters[byte]).join(""));
    });
  },
  Metaspace: (part) => {
    const [mark, scheme] = [part.replacement, part.prepend_scheme ?? "always"];
    return eachPiece(({ text, first }) => {
      let marked = text.replaceAll(" ", mark);
      const wanted = scheme === "always" || (scheme === "first" && first);
      if (wanted && !marked.startsWith(mark)) marked = mark + marked;
      const parts = () => BEHAVIORS.MergedWithNext(cut(marked, new RegExp(escaped(mark), "gu"), false));
      return (part.split ?? true) ? parts() : [marked];
    });
  },
  Split: (part) => {
    const pattern = patternOf(part.pattern);
    const behave = BEHAVIORS[part.behavior] ?? refuse("behaviour of Split", part.behavior);
    return eachPiece(({ text }) => behave(cut(text, pattern, part.invert)));
  },
  WhitespaceSplit: () => eachPiece(({ text }) => text.split(new RegExp(`${SPACE}+`, "u"))),
};

// ---------------------------------------------------------------- models: a word to ids

function bpe(model) {
  if (model.dropout != null) refuse("dropout", model.dropout);
  const [vocab, merges] = [new Map(Object.entries(model.vocab)), new Map()];
  const size = Math.max(0, ...[...vocab.values()].slice(0, 1), vocab.size) + 2 ** 20; // above every id
  const [prefix, suffix] = [model.continuing_subword_prefix ?? "", model.end_of_word_suffix ?? ""];
  model.merges.forEach((merge, rank) => {
    const [left, right] = typeof merge === "string" ? merge.split(" ") : merge;
    const token = vocab.get(left + right.slice(prefix.length));
    merges.set(vocab.get(left) * size + vocab.get(right), [rank, token]);
  });
  const unknown = model.unk_token == null ? null : (vocab.get(model.unk_token) ?? refuse("unknown token", model.unk_token));

  /** The ids of a word's characters, and of bytes or the unknown token where it has none. */
  function start(word) {
    const [characters, ids] = [Array.from(word), []];
    let pending = false; // an unknown token that is not written yet: further ones may be fused with it
    characters.forEach((character, i) => {
      const token = (i ? prefix : "") + character + (i === characters.length - 1 ? suffix : "");
      const id = vocab.get(token);
      if (id !== undefined) {
        if (pending) ids.push(unknown);
        pending = false;
        ids.push(id);
        return;
      }
      const bytes = model.byte_fallback ? Array.from(bytesOf(token), (byte) => vocab.get(byteToken(byte))) : [undefined];
      if (!bytes.includes(undefined)) ids.push(...bytes);
      else if (unknown !== null) {
        if (pending && !model.fuse_unk) ids.push(unknown);
        pending = true;
      }
    });
    return pending ? [...ids, unknown] : ids;
  }

  return (word) => {
    if (model.ignore_merges && vocab.has(word)) return [vocab.get(word)];
    const ids = start(word);
    const mergeAt = (i) => merges.get(ids[i] * size + ids[i + 1]);
    const found = ids.map((_, i) => mergeAt(i)); // of every place the merge with the next one
    for (;;) {
      let best = -1; // the first of the lowest rank
      found.forEach((merge, i) => {
        if (merge && (best < 0 || merge[0] < found[best][0])) best = i;
      });
      if (best < 0) return ids;
      ids.splice(best, 2, found[best][1]);
      found.splice(best, 1);
      found[best] = mergeAt(best);
      if (best) found[best - 1] = mergeAt(best - 1);
    }
  };
}

function unigram(model) {
  if (model.unk_id == null) refuse("unknown token", model.unk_id);
  const ids = new Map(model.vocab.map(([piece], id) => [piece, id]));
  const scores = model.vocab.map(([, score]) => score);
  const [unknown, longest] = [model.unk_id, model.vocab.reduce((most, [piece]) => Math.max(most, piece.length), 0)];
  const unknownScore = scores.reduce((least, score) => Math.min(least, score), 0) - UNKNOWN_PENALTY;

  /** The pieces of the best path through a word, and whether each is unknown. */
  function best(word) {
    const paths = Array.from({ length: word.length + 1 }, () => null); // of every end {score, start, id}
    paths[0] = { score: 0 };
    const offer = (start, end, score, id) => {
      if (paths[end] === null || score > paths[end].score) paths[end] = { score, start, id };
    };
    for (let start = 0, step; start < word.length; start += step) {
      step = word.codePointAt(start) > 0xffff ? 2 : 1;
      const [till, last] = [paths[start].score, Math.min(word.length, start + longest)];
      for (let end = start + step; end <= last; end++) {
        const id = ids.get(word.slice(start, end));
        if (id !== undefined) offer(start, end, scores[id] + till, id);
      }
      if (!ids.has(word.slice(start, start + step))) offer(start, start + step, unknownScore + till, unknown);
    }
    const found = [];
    for (let end = word.length; end > 0; end = paths[end].start) {
      found.push([word.slice(paths[end].start, end), paths[end].id === unknown]);
    }
    return found.reverse();
  }

  return (word) => {
    const pieces = []; // neighbours that are unknown are one
    let open = false;
    for (const [piece, isUnknown] of best(word)) {
      if (isUnknown && open) pieces.push(pieces.pop() + piece);
      else pieces.push(piece);
      open = isUnknown;
    }
    return pieces.flatMap((piece) => {
      if (ids.has(piece)) return ids.get(piece);
      const bytes = model.byte_fallback ? Array.from(bytesOf(piece), (byte) => ids.get(byteToken(byte))) : [undefined];
      return bytes.includes(undefined) ? unknown : bytes;
    });
  };
}

function wordLevel(model) {
  const vocab = new Map(Object.entries(model.vocab));
  const unknown = vocab.get(model.unk_token) ?? refuse("unknown token", model.unk_token);
  return (word) => vocab.get(word) ?? unknown;
}

const MODELS = { BPE: bpe, Unigram: unigram, WordLevel: wordLevel };

// ---------------------------------------------------------------- post-processors: ids to ids

/** The first token around a text and the last. */
const around = (part) => (ids) => [part.cls[1], ...ids, part.sep[1]];
const POST_PROCESSORS = {
  ByteLevel: () => (ids) => ids,
  BertProcessing: around,
  RobertaProcessing: around,
  TemplateProcessing: (part) => (ids) =>
    part.single.flatMap((piece) => (piece.Sequence ? ids : part.special_tokens[piece.SpecialToken.id].ids)),
};

// ---------------------------------------------------------------- added tokens

/** A function that cuts the added tokens out of a text: [text, id or null]. `contents`: of every token what to look for. */
function finder(tokens, contents) {
  const byContent = new Map();
  tokens.forEach((token, i) => contents[i] && !byContent.has(contents[i]) && byContent.set(contents[i], token));
  const longestFirst = [...byContent.keys()].sort((a, b) => b.length - a.length);
  if (!longestFirst.length) return (text) => [[text, null]];
  const pattern = new RegExp(longestFirst.map(escaped).join("|"), "gu");
  return (text) => {
    const found = [];
    let done = 0;
    for (const match of text.matchAll(pattern)) {
      const token = byContent.get(match[0]);
      let [start, end] = [match.index, match.index + match[0].length];
      const [before, after] = [Array.from(text.slice(0, start)).at(-1) ?? "", Array.from(text.slice(end, end + 2))[0] ?? ""];
      if (token.single_word && (WORD.test(before) || WORD.test(after))) continue;
      if (token.lstrip) start = Math.max(done, text.slice(0, start).search(new RegExp(`${SPACE}*$`, "u")));
      if (token.rstrip) end += text.slice(end).match(new RegExp(`^${SPACE}*`, "u"))[0].length;
      if (start > done) found.push([text.slice(done, start), null]);
      found.push([match[0], token.id]);
      done = end;
    }
    if (done < text.length) found.push([text.slice(done), null]);
    return found;
  };
}

// ---------------------------------------------------------------- all together

/**
 * A tokenizer of the content of tokenizer.json. `encode(text, {specials})` gives the ids, with those that the tokenizer
 * puts around a text unless `specials` is false. Throws an error for a kind of tokenizer that is not written here.
 */
export function loadTokenizer(json) {
  const normalize = partOf("normalizer", NORMALIZERS, json.normalizer, "normalizers");
  const split = partOf("pre-tokenizer", PRE_TOKENIZERS, json.pre_tokenizer, "pretokenizers");
  const finish = partOf("post-processor", POST_PROCESSORS, json.post_processor, "processors");
  const word = partOf("model", MODELS, json.model);
  const added = json.added_tokens ?? [];
  const [raw, normalized] = [added.filter((token) => !token.normalized), added.filter((token) => token.normalized)];
  const findRaw = finder(raw, raw.map((token) => token.content));
  const findNormalized = finder(normalized, normalized.map((token) => normalize(token.content)));

  function encode(text, { specials = true } = {}) {
    const whole = text.replace(/\p{Cs}/gu, "\ufffd"); // half a pair of UTF-16 is no character
    const ids = [];
    let first = true;
    for (const [piece, id] of findRaw(whole)) {
      for (const [part, inner] of id === null ? findNormalized(normalize(piece)) : [[piece, id]]) {
        if (inner !== null) ids.push(inner);
        else if (part) for (const { text: one } of split([{ text: part, first }])) ids.push(word(one));
        first = false;
      }
    }
    return specials ? finish(ids.flat()) : ids.flat();
  }
  return { encode };
}
