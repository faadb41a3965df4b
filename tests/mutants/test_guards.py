"""Guards are where ``guards.py`` says: who moves one learns of it before ``make mutants``."""

import ast
from pathlib import Path

import pytest

from tests.mutants.guard import Guard
from tests.mutants.guards import GUARDS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_is_there_once_and_can_be_taken_away(guard: Guard) -> None:
    text = (ROOT / guard.file).read_text()
    assert text.count(guard.old) == 1, f"{guard.old!r} in {guard.file}: mend guards.py"
    without = text.replace(guard.old, guard.new)
    assert ast.dump(ast.parse(without)) != ast.dump(ast.parse(text)), "it would change nothing"


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_the_tests_that_have_to_notice_are_there(guard: Guard) -> None:
    assert guard.tests
    for test in guard.tests:
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text()
        assert not name or f"def {name}(" in text, f"{test} is gone: mend guards.py"


def test_every_guard_has_a_name_of_its_own() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)
