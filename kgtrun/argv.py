"""Reads the command line of a launch the way torchrun's users type it.

Options end at the first word that is none: the script; everything behind it is the script's. Names may be written with
dashes or underscores, shortened as far as they stay unambiguous, and joined to their value by `=` or a blank.

Errors: `UsageError` with what would be valid, the nearest names for an unknown option.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kgtrun.options import ALL, Option


class UsageError(ValueError):
    """The command line cannot be understood; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line, read: values by option, and what is the script's."""

    values: Mapping[str, str] = field(default_factory=dict)
    """By `Option.dest`: given on the command line, in the environment, or the default; flags are "1" or "0"."""
    given: frozenset[str] = frozenset()
    """Those that do not have their default."""
    script: tuple[str, ...] = ()

    def text(self, name: str) -> str:
        return self.values.get(name, "")

    def flag(self, name: str) -> bool:
        return self.values.get(name, "0") not in ("", "0")


def find_option(written: str, options: Sequence[Option] = ALL) -> Option:
    """The option a long name means, dashes, underscores and unambiguous prefixes allowed.

    Raises:
        UsageError: none or several.
    """
    by_name = {option.name: option for option in options}
    name = written.replace("_", "-")
    if name in by_name:
        return by_name[name]
    candidates = sorted(known for known in by_name if known.startswith(name)) if name else []
    if len(candidates) == 1:
        return by_name[candidates[0]]
    if candidates:
        raise UsageError(f"--{written} could be any of {', '.join('--' + c for c in candidates)}")
    near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join('--' + n for n in near)}?" if near else "see kgtrun --help"
    raise UsageError(f"no option --{written}: {hint}")


def _check(option: Option, value: str, source: str) -> str:
    if option.choices and value not in option.choices:
        raise UsageError(f"{source} is {value!r}: choose from {', '.join(option.choices)}")
    return value


def _flag_from_variable(option: Option, text: str) -> str:
    low = text.strip().lower()
    if low in ("1", "true", "yes", "on") or (low.isdecimal() and int(low)):
        return "1"
    if low in ("0", "false", "no", "off"):
        return "0"
    raise UsageError(f"{option.variable}={text!r} is not a switch: use 1 or 0")


def _defaults(environ: Mapping[str, str], options: Sequence[Option]) -> tuple[dict[str, str], set[str]]:
    values, given = {}, set()
    for option in options:
        text = environ.get(option.variable) if option.variable else None
        if text:
            value = _flag_from_variable(option, text) if option.flag else _check(option, text, option.variable or "")
            values[option.dest] = value
            given.add(option.dest)
        elif text is not None and option.number and not option.ours:
            values[option.dest] = ""  # refused unless the command line has a number
        elif option.default is not None:
            values[option.dest] = option.default
    return values, given


def read(argv: Sequence[str], environ: Mapping[str, str] | None = None, options: Sequence[Option] = ALL) -> Request:
    """Read one command line of `options`.

    Raises:
        UsageError: as the module says.
    """
    values, given = _defaults(os.environ if environ is None else environ, options)
    words = list(argv)
    while words:
        word = words[0]
        if word == "--":
            words.pop(0)
            break
        if not word.startswith("-") or word == "-":
            break
        words.pop(0)
        option, value = _split(word, options)
        if option.flag:
            if value is not None:
                raise UsageError(f"--{option.name} takes no value")
            value = "1"
        elif value is None:
            if not words:
                raise UsageError(f"--{option.name} needs a value")
            value = words.pop(0)
        values[option.dest] = _check(option, value, f"--{option.name}")
        given.add(option.dest)
    for option in options:
        if option.number and values.get(option.dest) == "":
            source = f"--{option.name}" if option.dest in given else option.variable
            raise UsageError(f"{source} is empty: it needs a value")
    return Request(values=values, given=frozenset(given), script=tuple(words))


def _split(word: str, options: Sequence[Option]) -> tuple[Option, str | None]:
    """Option and joined value of one word that starts with a dash."""
    if word.startswith("--"):
        name, joined, value = word[2:].partition("=")
        return find_option(name, options), value if joined else None
    by_short = {option.short: option for option in options if option.short}
    option = by_short.get(word[1])
    if option is None:
        shorts = ", ".join(f"-{s}" for s in sorted(by_short))
        raise UsageError(f"no option {word}: the short ones are {shorts}; see kgtrun --help")
    rest = word[2:].removeprefix("=")
    return option, rest or None
