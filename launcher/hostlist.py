"""Slurm's two notations for many of something, expanded: host lists and counts by node.

    h[0-3,7]            h0 h1 h2 h3 h7
    a[01-03]b[1-2],c    a01b1 a01b2 a02b1 ... c          the last bracket turns fastest, zeros in front stay
    2(x3),1             2 2 2 1

Our own and not `scontrol show hostnames`: containers have no scontrol. Pure functions; `ValueError` with the text for
anything that is not this notation.
"""

from __future__ import annotations

import itertools
import re

_MOST = 1 << 16
"""Hosts in one list: more than any cluster has, less than a wrong range could make."""

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(text: str) -> tuple[str, ...]:
    """Every host of a host list, in its order.

    Raises:
        ValueError: brackets that do not match or are nested, a range that is none, a list without hosts.
    """
    hosts: list[str] = []
    for item in _split(text):
        parts = [_alternatives(part, text) for part in re.split(r"(\[[^\[\]]*\])", item)]
        for host in itertools.product(*parts):
            hosts.append("".join(host))
            if len(hosts) > _MOST:
                raise ValueError(f"the host list {text!r} names more than {_MOST} hosts")
    if not hosts:
        raise ValueError("an empty host list")
    return tuple(hosts)


def _split(text: str) -> list[str]:
    """Items between commas that stand outside of brackets."""
    items, depth, item = [], 0, ""
    for char in text.strip():
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise ValueError(f"{text!r} is no host list: its brackets do not match, or are nested")
        if char == "," and depth == 0:
            items.append(item)
            item = ""
        else:
            item += char
    if depth:
        raise ValueError(f"{text!r} is no host list: a bracket is not closed")
    items.append(item)
    return [i for i in (i.strip() for i in items) if i]


def _alternatives(part: str, text: str) -> list[str]:
    """What one part of an item can be: itself, or each number of a bracket."""
    if not part.startswith("["):
        return [part]
    found: list[str] = []
    for run in part[1:-1].split(","):
        first, dash, last = run.strip().partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or not 0 <= int(last) - int(first) < _MOST:
            raise ValueError(f"{text!r} is no host list: {run!r} in brackets is no number or range like 01-03")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def expand_counts(text: str) -> tuple[int, ...]:
    """Counts by node from `2(x3),1`.

    Raises:
        ValueError: it is no such list.
    """
    counts: list[int] = []
    for item in text.strip().split(","):
        match = _COUNT.fullmatch(item.strip())
        if match is None or int(match[2] or 1) > _MOST:
            raise ValueError(f"{text!r} is no list of counts like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)
