from __future__ import annotations

import ast

import pytest

from kgtrun.options import ALL
from tests.launcher import flag_table


def test_every_flag_has_a_test():
    assert set(flag_table.TESTS) == {option.name for option in ALL}


@pytest.mark.parametrize(
    "test", sorted({*flag_table.TESTS.values(), *(test for row in flag_table.COMPLAINTS for test in row[2])})
)
def test_the_tests_that_are_named_exist(test):
    path, _, name = test.partition("::")
    tree = ast.parse((flag_table.ROOT / path).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_document_is_up_to_date():
    text = flag_table.DOCUMENT.read_text()
    assert flag_table.render(text) == text, "run: python -m tests.launcher.flag_table --write"
