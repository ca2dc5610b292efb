"""The list of faults that tests notice is about the code as it stands; and, slowly, is true."""

import ast

import mutations
import pytest


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_the_fault_can_be_put_in_and_its_test_exists(name):
    file, text = mutations.changed(name)
    assert text != (mutations.ROOT / file).read_text(encoding="utf-8") and ast.parse(text)
    place, function = mutations.MUTATIONS[name][3].split("::")
    assert f"def {function}(" in (mutations.ROOT / "tests" / place).read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_fault_is_noticed():
    assert mutations.main("") == 0
