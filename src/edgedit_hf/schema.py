"""Schemas: dataclasses whose fields say type, range and meaning, for values that others wrote: recipes and the JSON
files of a run. No torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EdgeDiTError
from .files import parse_json, read_json

SIMPLE = (bool, int, float, str)
# Control characters and line separators, which end or falsify paths, lines and tables; halves of surrogate pairs, which
# cannot be written.
STRANGE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Rule:
    """What a field may hold beside its type; in lists and dicts it is said of every value in them.

    Args:
        choices: the only values there may be.
        minimum, maximum: the least and the greatest number. above, below: bounds that are no values themselves.
        length: of a text, in characters, the least and the greatest.
        free: whether a text may hold control characters, as captions and names of classes may.
        path: whether a text is a path, whose names have at most 255 bytes. file: whether it becomes the name of a file.
        items: greatest number of entries of a list or dict. fewest: the least number.
    """

    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    length: tuple[int, int] = (1, 4096)
    free: bool = False
    path: bool = False
    file: bool = False
    items: int = 10**7
    fewest: int = 0


def key(default: Any = dataclasses.MISSING, doc: str = "", choices: Sequence[Any] = (), **rule: Any) -> Any:
    """A field of a schema; without a default it must be there.

    Args:
        default: its value when it is left out, or what makes it. doc: what it means. choices, rule: of [`Rule`].
    """
    metadata = {"doc": doc, "rule": Rule(choices=tuple(choices), **rule)}
    if default is dataclasses.MISSING or not callable(default):
        return dataclasses.field(default=default, metadata=metadata)
    return dataclasses.field(default_factory=default, metadata=metadata)


# -------------------------------------------------------------------- one value


def shorten(value: Any, limit: int = 120) -> str:
    """What a message quotes of a value that may be of any size or depth."""
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"a number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = limit
    short.maxlong = limit
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 2 * limit else f"{text[:limit]}…"


def _wanted(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_wanted, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "keys and values"
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"list of {_wanted(inner[0])}"
    return f"keys with {_wanted(inner[1])}" if typing.get_origin(hint) is dict else getattr(hint, "__name__", str(hint))


def _number(value: Any, name: str, rule: Rule) -> None:
    shown = shorten(value)
    if isinstance(value, float) and not math.isfinite(value):
        least = f"at least {rule.minimum:g} and finite" if rule.minimum is not None else "a finite number"
        raise EdgeDiTError(f"{name} is {shown}; it must be {least}.")
    for fails, words in (
        (rule.minimum is not None and value < rule.minimum, f"at least {rule.minimum}"),
        (rule.maximum is not None and value > rule.maximum, f"at most {rule.maximum}"),
        (rule.above is not None and value <= rule.above, f"above {rule.above}"),
        (rule.below is not None and value >= rule.below, f"below {rule.below}"),
    ):
        if fails:
            raise EdgeDiTError(f"{name} is {shown}; it must be {words}.")


def _text(value: str, name: str, rule: Rule) -> None:
    least, greatest = rule.length
    if len(value) < least or least and not value.strip():
        raise EdgeDiTError(f"{name} is {value[:20]!r}; it must not be empty.")
    if len(value) > greatest:
        raise EdgeDiTError(f"{name} is {shorten(value)}, {len(value)} characters; it may have at most {greatest}.")
    if rule.free:
        return
    if (strange := STRANGE.search(value)) is not None:
        raise EdgeDiTError(
            f"{name} is {shorten(value)}; it holds the character {strange[0]!r}, which it must not; write it without."
        )
    if rule.file and not re.fullmatch(r"\w[\w.-]{0,127}", value):
        raise EdgeDiTError(
            f"{name} is {shorten(value)}; it may hold letters, digits, '_', '-' and '.', and begin with one of the "
            "first three."
        )
    if rule.path and any(len(part.encode()) > 255 for part in value.split("/")):
        raise EdgeDiTError(f"{name} is {shorten(value)}; the names in it must have at most 255 bytes.")


def convert(value: Any, hint: Any, name: str, rule: Rule = Rule(), *, text_numbers: bool = False) -> Any:
    """A plain value as its type hint has it.

    Args:
        hint: bool, int, float, str, Any, a dataclass, lists and dicts (with keys of text) of these, or a union of such.
        name: what messages call it.
        text_numbers: whether a text may stand for a float (YAML reads 1e-3 as text).

    Raises:
        EdgeDiTError: the value has another type, or breaks the rule; it is quoted, and what may stand there.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if Any in options or value is None and type(None) in options:
        return value
    if text_numbers and float in options and str not in options and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    kind = type(value)
    if kind in SIMPLE and (kind in options or kind is int and float in options):
        if kind is not str and kind is not bool:
            try:
                value = value if int in options and kind is int else float(value)
            except OverflowError:
                raise EdgeDiTError(
                    f"{name} is {shorten(value)}; it must be a number that floating point can hold."
                ) from None
            _number(value, name, rule)
        elif kind is str:
            _text(value, name, rule)
        if rule.choices and value not in rule.choices:
            raise EdgeDiTError(f"{name} is {shorten(value)}; it must be one of {', '.join(map(str, rule.choices))}.")
        return value
    for option in options:
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if origin is list and kind is list:
            _count(value, name, rule)
            if inner[0] in SIMPLE and not all(
                type(item) is inner[0] or inner[0] is float and type(item) is int for item in value
            ):
                break
            return [_item(item, inner[0], name, place, rule, text_numbers) for place, item in enumerate(value)]
        if origin is dict and kind is dict:
            _count(value, name, rule)
            if not all(isinstance(entry, str) for entry in value):
                break
            return {
                entry: convert(item, inner[1], f"{name}.{shorten(entry)[1:-1]}", rule, text_numbers=text_numbers)
                for entry, item in value.items()
            }
        if isinstance(option, type) and dataclasses.is_dataclass(option) and kind is dict:
            check(value, option, name)
            return value
    raise EdgeDiTError(
        f"{name} is {shorten(value)} ({kind.__name__}); it must be {' or '.join(map(_wanted, options))}."
    )


def _count(value: list | dict, name: str, rule: Rule) -> None:
    if not rule.fewest <= len(value) <= rule.items:
        bound = f"at most {rule.items}" if len(value) > rule.items else f"at least {rule.fewest}"
        raise EdgeDiTError(f"{name} has {len(value)} entries; it must have {bound}.")


def _item(item: Any, hint: Any, name: str, place: int, rule: Rule, text_numbers: bool) -> Any:
    if rule.choices and hint in SIMPLE and item not in rule.choices:
        raise EdgeDiTError(f"{name} holds {shorten(item)}; it may hold {', '.join(map(str, rule.choices))}.")
    return convert(item, hint, f"{name}[{place}]", rule, text_numbers=text_numbers)


# -------------------------------------------------------------------- options of a command


def check_option(option: str, value: Any, rule: Rule) -> None:
    """Raise unless an option of a command, where it is given (not `None`), is a number in the range of its rule.

    It must be a whole number where the range's end is one.

    Args:
        option: its name, without the dashes; `_` stands for `-`.

    Raises:
        EdgeDiTError: naming the option, its value and its range.
    """
    if value is None:
        return
    whole = isinstance(rule.maximum, int)
    least = rule.above if rule.minimum is None else rule.minimum
    assert least is not None and rule.maximum is not None, "the rule of an option has a range"
    try:
        number = (int if whole else float)(value)
        fits = (
            least <= number <= rule.maximum
            and number != rule.above
            and (not whole or number == float(value) or isinstance(value, str))
            and math.isfinite(number)
            and not isinstance(value, bool)
        )
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        kind = "a whole number" if whole else "a number"
        start = f"above {least:g}, up to" if rule.above is not None else f"from {least:g} to"
        end = "2^63 - 1" if rule.maximum == 2**63 - 1 else str(rule.maximum) if whole else f"{rule.maximum:g}"
        raise EdgeDiTError(f"--{option.replace('_', '-')} is {value}; give {kind} {start} {end}.")


# -------------------------------------------------------------------- many


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """The types of a schema's fields."""
    return typing.get_type_hints(schema)


@functools.cache
def _fields(schema: Any) -> dict[str, tuple[Any, Rule, bool]]:
    return {
        entry.name: (
            hints_of(schema)[entry.name],
            entry.metadata.get("rule", Rule()),
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING,
        )
        for entry in dataclasses.fields(schema)
    }


def fill(target: Any, values: Any, source: str, prefix: str = "") -> list[str]:
    """Set fields of a dataclass, and of the dataclasses in it, from nested plain values: every key must be one of its
    fields.

    Args:
        source: what messages call the values' place. prefix: dotted name of `target` in it.

    Returns:
        the dotted names that were set.
    """
    if not isinstance(values, dict):
        raise EdgeDiTError(
            f"{source}: {prefix or 'the file'} holds {type(values).__name__}; it must hold keys and values."
        )
    kind: Any = type(target)
    fields, given = _fields(kind), []
    for entry, value in values.items():
        name = f"{prefix}.{entry}" if prefix else str(entry)
        if entry not in fields:
            shown = shorten(name)[1:-1]
            near = difflib.get_close_matches(str(entry)[:100], fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys there are {', '.join(fields)}."
            raise EdgeDiTError(f"{source}: unknown key {shown!r}; {hint}")
        hint, rule, _ = fields[entry]
        if dataclasses.is_dataclass(hint):
            given += fill(getattr(target, entry), {} if value is None else value, source, name)
            continue
        setattr(target, entry, convert(value, hint, f"{source}: {name}", rule, text_numbers=True))
        given.append(name)
    return given


def check(values: Any, schema: type, name: str = "") -> None:
    """Raise [`EdgeDiTError`] unless plain values are what a schema says. Keys that it does not know are let pass: newer
    versions write more.

    Args:
        name: what messages call the values; without one they are the content of a file.
    """
    if not isinstance(values, Mapping):
        raise EdgeDiTError(
            f"{name or 'it'} is {shorten(values)} ({type(values).__name__}); it must hold keys and values."
        )
    for entry, (hint, rule, needed) in _fields(schema).items():
        whole = f"{name}.{entry}" if name else entry
        if entry in values:
            convert(values[entry], hint, whole, rule)
        elif needed:
            raise EdgeDiTError(
                f"{whole} is missing beside {shorten(sorted(map(str, values)))}; it must be {_wanted(hint)}."
            )


def read_record(
    path: str | os.PathLike, schema: Any, made_by: str, what: str = "what is written there", nan: bool = False
) -> Any:
    """Read a JSON file and hold it against its schema; its values come back as they stand, also those that the schema
    does not know.

    Args:
        schema: a dataclass with [`key`]s, or a type hint as [`convert`] takes them. made_by: the stage that writes the
            file.
        what: words for what it should hold, e.g. "a latent cache".
        nan: whether NaN and infinities may stand in it.

    Raises:
        EdgeDiTError: the file is missing or no JSON, or a key is missing, of another type, or out of its range.
    """
    values = read_json(path, made_by, nan=nan)
    held_to(values, schema, path, made_by, what)
    return values


def held_to(
    values: Any, schema: Any, source: str | os.PathLike, made_by: str, what: str = "what is written there"
) -> None:
    """Hold the content of a file against its schema, as [`read_record`] does."""
    try:
        check(values, schema) if isinstance(schema, type) and dataclasses.is_dataclass(schema) else convert(
            values, schema, "it"
        )
    except EdgeDiTError as error:
        again = (
            f"{made_by} writes it, run that stage again"
            if made_by.startswith("stage ")
            else f"{made_by} writes it, make it anew"
        )
        raise EdgeDiTError(
            f"{source} does not describe {what}: {str(error).removesuffix('.')}. It is damaged or foreign; {again}."
        ) from None


def read_lines(path: str | os.PathLike, schema: type, made_by: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line, as [`read_record`]; a last line that a kill cut off is left
    out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeDiTError(f"{path} cannot be read ({error}); it is written by {made_by}.") from None
    found = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("}"):
            break  # nothing after the last line break, or what was cut
        try:
            values = parse_json(line, nan=True)
        except ValueError as error:
            raise EdgeDiTError(
                f"Line {number} of {path} is not JSON ({error}); it is damaged. It is written by {made_by}."
            ) from None
        held_to(values, schema, f"Line {number} of {path}", made_by)
        found.append(values)
    return found
