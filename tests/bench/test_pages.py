"""The performance page: its tables are its records', and only what is marked is rewritten."""

import pytest

from bench import cpu_report, engines_report
from bench.pages import PAGE, marks, read_record, replace_part

START, STOP = marks("cpu")
PAGE_TEXT = f"before\n{START}\nold\n{STOP}\nafter\n"


def test_only_what_is_between_the_marks_changes() -> None:
    changed = replace_part(PAGE_TEXT, "cpu", "new\n")
    assert changed == f"before\n{START}\nnew\n{STOP}\nafter\n"
    assert replace_part(changed, "cpu", "new") == changed


@pytest.mark.parametrize(
    "page",
    ["no marks", f"{START} without an end", f"{STOP} and then {START}", PAGE_TEXT + PAGE_TEXT],
)
def test_a_page_without_the_two_marks_in_order_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        replace_part(page, "cpu", "new")


@pytest.mark.parametrize(
    ("name", "tables"), [("cpu", cpu_report.tables), ("engines", engines_report.tables)]
)
def test_the_pages_tables_are_those_of_the_records(name: str, tables: object) -> None:
    record = read_record(name)
    assert record is not None, f"python -m bench.{name} --out docs/performance"
    assert callable(tables)
    page = PAGE.read_text()
    assert replace_part(page, name, tables(record)) == page, f"python -m bench.{name} --docs"
