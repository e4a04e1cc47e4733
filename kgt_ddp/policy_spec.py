"""From text to policy: `name` or `name:key=value,key=value`.

The one place that knows every policy by name, and the only one of them that reads a disk (`replay:RUN_DIR`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kgt_ddp.errors import PolicyError
from kgt_ddp.policies.gradnorm import GradNorm
from kgt_ddp.policies.kgt import Kgt
from kgt_ddp.policies.kgt_paper import KgtPaper
from kgt_ddp.policies.policy import Policy
from kgt_ddp.policies.schedules import Linear, NeverFreeze, Replay, Static
from kgtrun.contract.events import read_events

_BUILDERS: dict[str, Callable[..., Policy]] = {
    "none": NeverFreeze,
    "static": Static,
    "linear": Linear,
    "gradnorm": GradNorm,
    "kgt-paper": KgtPaper,
    "kgt": Kgt,
}


def policy_names() -> list[str]:
    """The names `parse_policy` knows."""
    return sorted([*_BUILDERS, "replay"])


def parse_policy(spec: str) -> Policy:
    """Build the policy that `spec` describes, for example `linear:start=0.3,stop=0.7` or `replay:RUN_DIR`.

    Raises:
        PolicyError: unknown name or option, missing option, value of the wrong kind or out of range.
    """
    name, _, text = spec.strip().partition(":")
    if name == "replay":
        return _recorded(text)
    if name not in _BUILDERS:
        raise PolicyError(f"unknown policy {name!r}: use one of {', '.join(policy_names())}")
    builder = _BUILDERS[name]
    try:
        return builder(**_options(name, builder, text))
    except (TypeError, ValueError) as error:
        raise PolicyError(f"policy {spec!r}: {error}") from None


def _options(name: str, builder: Callable[..., Policy], text: str) -> dict[str, Any]:
    kinds = _kinds(builder)
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = item.partition("=")
        if key not in kinds or not separator:
            known = ", ".join(f"{k}=…" for k in kinds) or "none"
            raise ValueError(f"{item!r} is not an option of {name}; its options: {known}")
        kind = kinds[key]
        try:
            options[key] = kind(value)
        except ValueError:
            raise ValueError(f"{key}={value!r} is not {'a whole number' if kind is int else 'a number'}") from None
    return options


def _kinds(builder: Callable[..., Policy]) -> dict[str, type]:
    """Option name to the type that reads it; `int | None` reads as int."""
    if not dataclasses.is_dataclass(builder):
        return {}
    hints = typing.get_type_hints(builder)
    return {
        f.name: next(t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None))
        for f in dataclasses.fields(builder)
        if f.init
    }


def _recorded(run_dir: str) -> Replay:
    if not run_dir or not Path(run_dir).is_dir():
        raise PolicyError(f"replay:{run_dir} needs the directory of a recorded run (the --run-dir of an earlier job)")
    table, weight_mean, as_they_were = set(), 0.0, set()
    writers: dict[int, set[tuple[str, int]]] = {}
    for event in read_events(run_dir):
        if event["kind"] == "resume":
            table.add((event["step"], event["frontier"]))
        elif event["kind"] == "apply":
            table.add((event["step"], event["frontier"]))
            if not event.get("at_mean", True):
                as_they_were.add(event["step"])
        elif event["kind"] == "blocks":
            weight_mean = event.get("weight_mean", 0.0)
            known, writer = writers.setdefault(event["index"], set()), (event["host"], event["pid"])
            if known - {writer} and writer not in known and "step" in event:
                # The job was started again, from a checkpoint: what came after that did not happen.
                table = {entry for entry in table if entry[0] < event["step"]}
                as_they_were = {step for step in as_they_were if step < event["step"]}
            known.add(writer)
    if not table:
        raise PolicyError(f"no mask was applied in the run recorded in {run_dir}: there is nothing to replay")
    return Replay(sorted(table), weight_mean, frozenset(as_they_were))
