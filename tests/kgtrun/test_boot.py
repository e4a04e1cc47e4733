"""A script cannot tell the boot step from python itself, nor our ranks from torchrun's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kgtrun.plan import BOOT

pytestmark = pytest.mark.integration

LOOK = """
import json, os, sys, pickle, multiprocessing
class Here: pass
def child(q): q.put(__name__)
if __name__ == "__main__":
    main = sys.modules["__main__"]
    assert main.__dict__ is globals() and pickle.loads(pickle.dumps(Here())).__class__ is Here
    context = multiprocessing.get_context("spawn")
    q = context.Queue()
    p = context.Process(target=child, args=(q,)); p.start(); spawned = q.get(timeout=20); p.join()
    print(json.dumps({
        "argv": sys.argv, "path": sys.path, "file": __file__, "name": __name__, "package": __package__,
        "spec": getattr(__spec__, "name", None), "loader": type(__loader__).__name__, "doc": __doc__,
        "names": sorted(globals()), "spawned": spawned, "cwd": os.getcwd(), "builtins": type(__builtins__).__name__,
    }))
"""


def look(command: list[str], cwd: Path) -> dict:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/train.py").write_text(LOOK)
    (tmp_path / "link.py").symlink_to("sub/train.py")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/link.py").symlink_to("../link.py")
    (tmp_path / "linked").symlink_to("sub")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/__init__.py").write_text("")
    # multiprocessing itself cannot spawn from a package's __main__
    (tmp_path / "pkg/__main__.py").write_text(LOOK.replace('"spawn"', '"fork"'))
    (tmp_path / "pkg/train.py").write_text(LOOK)
    # Names of ours in the user's directory must not get in the way, nor ours in his.
    for name in ("plan", "argv", "launcher", "cli"):
        (tmp_path / f"sub/{name}.py").write_text("raise AssertionError('imported')\n")
    return tmp_path


@pytest.mark.parametrize("script", ["sub/train.py", "./link.py", "links/link.py", "linked/train.py", "pkg"])
def test_a_script_sees_what_python_shows_it(place, script):
    mine = look([sys.executable, BOOT, "script", script, "--x", "1"], place)
    assert mine == look([sys.executable, script, "--x", "1"], place)


def test_a_safe_path_is_left_alone(place):
    mine = look([sys.executable, "-P", BOOT, "script", "links/link.py"], place)
    assert mine == look([sys.executable, "-P", "links/link.py"], place)


@pytest.mark.parametrize("module", ["pkg.train", "pkg"])
def test_a_module_sees_what_python_shows_it(place, module):
    mine = look([sys.executable, BOOT, "module", module, "--x", "1"], place)
    assert mine == look([sys.executable, "-m", module, "--x", "1"], place)


@pytest.mark.parametrize(
    ("text", "code"),
    [("raise SystemExit(5)", 5), ("1/0", 1), ("syntax error", 1), ("import sys; sys.exit('why')", 1), ("", 0)],
)
def test_exit_codes_and_tracebacks_are_pythons(tmp_path, text, code):
    path = tmp_path / "s.py"
    path.write_text(text + "\n")
    mine = subprocess.run([sys.executable, BOOT, "script", str(path)], capture_output=True, text=True, timeout=120)
    theirs = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert mine.returncode == theirs.returncode == code
    assert mine.stderr == theirs.stderr


LOST = "ConnectionResetError: by peer\n"
CHAINS = {
    "raise ConnectionResetError('by peer')": LOST,
    "try: raise ConnectionResetError('by peer')\nexcept OSError as e: raise KeyError(1) from e": LOST,
    "try: raise ConnectionResetError('by peer')\nexcept OSError: exit(3)": LOST,
    "try: raise ValueError('why')\nfinally: raise ConnectionResetError('by peer')": "ValueError: why\n",
    "try: raise KeyError(1)\nexcept KeyError: raise ValueError('why') from None": "ValueError: why\n",
}


@pytest.mark.parametrize(("text", "origin"), CHAINS.items())
def test_the_launcher_is_told_what_an_exception_began_with(tmp_path, text, origin):
    (tmp_path / "s.py").write_text(text)
    environment = {**os.environ, "KGTRUN_ERROR_FILE": str(tmp_path / "error")}
    command = [sys.executable, BOOT, "script", str(tmp_path / "s.py")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    found = json.loads((tmp_path / "error").read_text())
    assert (found["origin"], found["code"]) == (origin, done.returncode)


def test_a_missing_script_is_pythons_error(tmp_path):
    mine = subprocess.run([sys.executable, BOOT, "script", "no.py"], capture_output=True, text=True, cwd=tmp_path)
    theirs = subprocess.run([sys.executable, "no.py"], capture_output=True, text=True, cwd=tmp_path)
    assert (mine.returncode, mine.stderr) == (theirs.returncode, theirs.stderr)


def test_the_environment_is_torchruns_and_our_own_names(tmp_path):
    script = tmp_path / "env.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KGTRUN_", "PET_", "OMP_", "TORCHELASTIC_"))}
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job", "--role", "r"]
    options += ["--max-restarts", "2", "--nproc-per-node", "1", str(script)]
    found = {}
    for name, start in (("theirs", ["torch.distributed.run", "--log-dir", "l"]), ("ours", ["kgtrun", "--tee", "0"])):
        done = subprocess.run(
            [sys.executable, "-m", *start, *options],
            cwd=tmp_path,
            env=kept,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)
    ours = {k: v for k, v in found["ours"].items() if not k.startswith("KGTRUN_")}
    theirs = found["theirs"]
    for changing in ("MASTER_PORT", "TORCHELASTIC_ERROR_FILE"):
        assert ours.pop(changing) and theirs.pop(changing)
    assert ours == theirs


def test_no_python_and_run_path(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("#!/bin/sh\necho program $1 $RANK\n")
    script.chmod(0o755)
    kgtrun = [sys.executable, "-m", "kgtrun", "--tee", "0", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([*kgtrun, "--no-python", str(script), "a"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "program a 0\n", done.stderr
    script.write_text("import sys; print(__name__, sys.argv[1:])\n")
    done = subprocess.run([*kgtrun, "--run-path", str(script), "a"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "__main__ ['a']\n", done.stderr
