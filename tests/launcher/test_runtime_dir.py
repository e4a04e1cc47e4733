"""Where the sockets of a launch are."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from launcher.runtime_dir import shared_directory


@pytest.mark.parametrize(("length", "taken"), [(20, True), (100, False)])
def test_a_tmpdir_too_long_for_sockets_is_not_taken(length: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
    assert shared_directory("x").parent == Path(tempfile.gettempdir() if taken else "/tmp")
