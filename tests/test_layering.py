"""The import table of the project: which package may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FORBIDDEN = {
    "kgtrun/contract": ("kgtrun.", "launcher", "kgt_ddp", "torch", "click", "psutil", "numpy"),
    "launcher": ("kgt_ddp",),
    "kgt_ddp": ("launcher", "click", "psutil"),
    "kgt_ddp/policies": ("torch", "os", "time", "pathlib", "random"),
}
ONLY_CONTRACT = ("launcher", "kgt_ddp")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_nothing_forbidden(package: str) -> None:
    assert sources(package), f"no sources under {package}"
    for path in sources(package):
        for name in imports(path):
            for prefix in FORBIDDEN[package]:
                if package == "kgtrun/contract" and name.startswith("kgtrun.contract"):
                    continue
                hit = name == prefix.rstrip(".") or name.startswith(prefix.rstrip(".") + ".")
                assert not hit, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", ONLY_CONTRACT)
def test_of_kgtrun_only_the_contract_is_imported(package: str) -> None:
    for path in sources(package):
        for name in imports(path):
            if name == "kgtrun" or name.startswith("kgtrun."):
                assert name.startswith("kgtrun.contract"), f"{path.relative_to(ROOT)} imports {name}"
