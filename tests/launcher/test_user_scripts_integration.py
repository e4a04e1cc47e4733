"""Five scripts that never heard of kgtrun: torchrun's result bit for bit with freezing off, frozen blocks with it on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kgtrun.contract.events import read_events
from tests.stock_torch import run_to_an_orderly_end

pytestmark = pytest.mark.integration

SCRIPTS = Path(__file__).with_name("user_scripts")
NEEDS = {"hugging_face_trainer": "transformers", "accelerate_loop": "accelerate"}
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
FULL = bool(os.environ.get("KGTRUN_FULL_TESTS"))
"""All five in each test take minutes on two cores; by default the plain script is compared with torchrun, and four are
frozen, the Trainer (which is Accelerate underneath) among them. scripts/soak sets this."""


@pytest.fixture
def script(request) -> str:
    if request.param in NEEDS:
        pytest.importorskip("accelerate")
        pytest.importorskip(NEEDS[request.param])
    return str(SCRIPTS / f"{request.param}.py")


def tensors(state: dict) -> dict[str, torch.Tensor]:
    flat = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": tensor for name, tensor in tensors(value).items()}
        else:
            flat[key] = value
    return flat


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("script", NAMES if FULL else ["plain_torchrun"], indirect=True)
def test_torchruns_result_with_freezing_off(runs, script):
    theirs, ours = runs.directory / "theirs.pt", runs.directory / "ours.pt"

    def under_torchrun() -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--log-dir", "torch", script],
            env=runs.environment(OUTPUT=str(theirs)),
            cwd=runs.directory,
            timeout=240,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    code, output = run_to_an_orderly_end(under_torchrun)
    assert code == 0, output
    done = runs.run("--policy", "none", "--nproc-per-node", "2", script, OUTPUT=str(ours), timeout_s=240)
    assert done.code == 0, done.err
    expected, got = load(theirs), load(ours)
    assert got["losses"] == expected["losses"] and len(got["losses"]) >= 10
    found, wanted = tensors(got["model"]), tensors(expected["model"])
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("script", [n for n in NAMES if FULL or n != "accelerate_loop"], indirect=True)
def test_blocks_freeze_with_it_on(runs, script):
    done = runs.run(
        "--policy",
        "static:blocks=1,step=4",
        "--total-steps",
        "12",
        script,
        OUTPUT=str(runs.directory / "out.pt"),
        timeout_s=240,
    )
    assert done.code == 0, done.err
    applied = [event for event in read_events(done.run_dir) if event["kind"] == "apply"]
    assert [(event["was"], event["frontier"]) for event in applied] == [(0, 1)]
