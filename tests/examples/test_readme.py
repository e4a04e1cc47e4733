"""What the README shows is what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

from kgt_ddp.policy_spec import parse_policy

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_script_shown_is_the_script_shipped() -> None:
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    shipped = (ROOT / "examples" / "quickstart.py").read_text().partition('"""\n\n')[2]
    assert shown.group(1).strip() == shipped.strip()


def test_links_lead_to_files_and_commands_exist() -> None:
    pages = {ROOT / "README.md": README, ROOT / "docs" / "development.md": (ROOT / "docs/development.md").read_text()}
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for script in re.findall(r"\bscripts/\w+(?:\.txt)?", text):
            assert (ROOT / script).exists(), f"{page.name} names {script}"


def test_policies_shown_can_be_used() -> None:
    pages = [ROOT / "README.md", *(ROOT / "examples").glob("*.py")]
    shown = [spec for page in pages for spec in re.findall(r"--policy ([\w:=.,-]+)", page.read_text())]
    assert len(shown) >= 4
    for spec in shown:
        parse_policy(spec)
