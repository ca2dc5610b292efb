"""The list of faults that tests notice is about the code as it stands; and, slowly, is true."""

import mutations
import pytest


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_the_fault_can_be_put_in_and_its_test_exists(name):
    file, old, new, test = mutations.MUTATIONS[name]
    place, function = test.split("::")
    assert (mutations.ROOT / file).read_text(encoding="utf-8").count(old) == 1 and old != new
    assert f"def {function}(" in (mutations.ROOT / "tests" / place).read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_fault_is_noticed():
    assert mutations.main("") == 0
