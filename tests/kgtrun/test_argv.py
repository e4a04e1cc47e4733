"""The command line against torchrun's own parser, so that a new torch release shows what is missing."""

from __future__ import annotations

import argparse
import re

import pytest

from kgtrun.argv import UsageError, read
from kgtrun.options import OURS, TORCHRUN


def torchrun_actions() -> dict[str, argparse.Action]:
    from torch.distributed.run import get_args_parser

    return {a.dest: a for a in get_args_parser()._actions if a.option_strings and a.dest != "help"}


def test_every_torchrun_option_is_there_with_its_default_and_variable(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    theirs = torchrun_actions()
    ours = {option.dest: option for option in TORCHRUN}
    assert set(ours) == set(theirs)
    for dest, action in theirs.items():
        option = ours[dest]
        spelled = {f"--{option.name}", f"--{dest}"} | ({f"-{option.short}"} if option.short else set())
        assert set(action.option_strings) <= spelled, dest
        assert option.flag == (action.nargs == 0), dest
        assert tuple(action.choices or ()) == option.choices, dest
        if dest != "tee":  # 3 instead of 0, said in its help
            default = "" if action.default is None or action.nargs == 0 or action.default == [] else str(action.default)
            assert (option.default or "") == default, dest
        reads_variable = type(action).__name__ in ("env", "check_env")
        assert (option.variable == f"PET_{dest.upper()}") == reads_variable, dest


def test_our_own_options_are_pinned():
    assert " ".join(option.name for option in OURS) == (
        "policy total-steps run-dir ref-per-node ref-precision deterministic off no-drop-in cache cache-dir cache-bytes"
        " log-prefix no-core-sharing hang-timeout hang-action peer-timeout no-slurm requeue dry-run json version help"
    )


@pytest.mark.parametrize(
    "line",
    [
        "--nproc-per-node 2 train.py --epochs 3",
        "--nproc_per_node=2 train.py --epochs 3",
        "--nproc 2 train.py --epochs 3",
        "--nproc-p=2 -- train.py --epochs 3",
    ],
)
def test_dashes_underscores_prefixes_and_the_scripts_own_arguments(line):
    request = read(line.split(), {})
    assert request.text("nproc_per_node") == "2"
    assert request.script == ("train.py", "--epochs", "3")


def test_values_come_from_the_line_then_the_environment_then_the_default():
    assert read(["x.py"], {}).text("nnodes") == "1:1"
    assert read(["x.py"], {"PET_NNODES": "2"}).text("nnodes") == "2"
    assert read(["--nnodes", "3", "x.py"], {"PET_NNODES": "2"}).text("nnodes") == "3"
    assert read(["x.py"], {"PET_STANDALONE": "1"}).flag("standalone")
    assert not read(["x.py"], {"PET_STANDALONE": "0"}).flag("standalone")


NUMBERS = [option for option in OURS + TORCHRUN if option.number]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_an_empty_number_is_a_mistake_on_the_line_and_in_a_variable_where_torchrun_says_so(option, monkeypatch):
    for line in ([f"--{option.name}=", "x.py"], [f"--{option.name}", "", "x.py"]):
        with pytest.raises(UsageError, match=f"--{option.name} is empty"):
            read(line, {})
    if option.ours:
        assert option.variable is None or not read(["x.py"], {option.variable: ""}).given
        return
    from torch.distributed.run import config_from_args, parse_args

    monkeypatch.setenv(option.variable, "")
    with pytest.raises((SystemExit, ValueError)):
        config_from_args(parse_args(["x.py"]))
    with pytest.raises(UsageError, match=f"{option.variable} is empty"):
        read(["x.py"], {option.variable: ""})
    assert read([f"--{option.name}", "2", "x.py"], {option.variable: ""}).text(option.dest) == "2"


def test_all_numbers_are_known_as_such():
    theirs = {dest for dest, action in torchrun_actions().items() if action.type in (int, float)}
    assert theirs <= {option.dest for option in NUMBERS}


def test_the_help_names_every_policy():
    from kgt_ddp.policy_spec import policy_names

    (policy,) = (option for option in OURS if option.name == "policy")
    assert set(policy_names()) <= set(re.findall(r"[\w-]+", policy.help))


def test_short_options():
    request = read(["-m", "-r3", "-t", "0:1", "pkg.train", "-x"], {})
    assert request.flag("module") and request.text("redirects") == "3" and request.text("tee") == "0:1"
    assert request.script == ("pkg.train", "-x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--nproc-per-nod3 2 x.py", "--nproc-per-node"),
        ("--rdzv x x.py", "--rdzv-backend, --rdzv-conf, --rdzv-endpoint, --rdzv-id"),
        ("--start-method thread x.py", "spawn, fork, forkserver"),
        ("--standalone=1 x.py", "takes no value"),
        ("--nnodes", "needs a value"),
        ("-z x.py", "-h, -m, -r, -t"),
        ("--zzzzzz x.py", "kgtrun --help"),
    ],
)
def test_a_mistake_names_what_would_be_valid(line, message):
    with pytest.raises(UsageError, match=message):
        read(line.split(), {})
