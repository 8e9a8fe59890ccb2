"""Tables on terminals of different widths: words stay whole, and nothing is cut off."""

import re
import sys
from collections.abc import Callable

import pytest

from backcast.cli.output import WIDTH_OF_FILES, note, print_table, say

COLUMNS = ("operation", "done", "what became of it")
ROWS = [
    ("07ee63d5715a4f3b835a1a59c3c2cfd2", "40 %", "gate coverage-item: 4 of 9 ids are there"),
    ("ff992f37a1214a33ba1d6466141edd69", None, ""),
]

At = Callable[[int], list[str]]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> At:
    """Print the rows on a terminal so wide, and return the lines."""

    def print_at(width: int) -> list[str]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        capsys.readouterr()
        print_table(COLUMNS, ROWS)
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return print_at


def test_a_wide_terminal_shows_a_row_a_line_with_numbers_to_the_right(at: At) -> None:
    assert at(100)[3:-1] == [
        "│ 07ee63d5715a4f3b835a1a59c3c2cfd2 │ 40 % │ gate coverage-item: 4 of 9 ids are there │",
        "│ ff992f37a1214a33ba1d6466141edd69 │    - │                                          │",
    ]


@pytest.mark.parametrize("width", [80, 70, 62])
def test_a_narrower_one_breaks_between_words_only(at: At, width: int) -> None:
    lines = at(width)
    assert all(len(line) <= width for line in lines)
    shown = " ".join(re.sub(r"[│┃]", " ", " ".join(lines)).split())
    assert {ROWS[0][0], ROWS[1][0], *["gate", "coverage-item:", "ids", "there", "became"]} <= set(
        shown.split()
    )


def test_a_narrow_one_lists_the_cells_of_each_row_whole(at: At) -> None:
    assert at(50) == [
        "operation          07ee63d5715a4f3b835a1a59c3c2cfd2",
        "done               40 %",
        "what became of it  gate coverage-item: 4 of 9 ids are there",
        "",
        "operation          ff992f37a1214a33ba1d6466141edd69",
        "",
    ]


def test_an_id_that_begins_with_digits_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("id", "number"), [("07ee63d", "-0.5"), ("1", "12.25 (5 %)")])
    assert capsys.readouterr().out.splitlines()[3:-1] == [
        "│ 07ee63d │        -0.5 │",
        "│ 1       │ 12.25 (5 %) │",
    ]


@pytest.mark.parametrize("width", [100, 20])
def test_nothing_that_is_printed_steers_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: width < WIDTH_OF_FILES)
    monkeypatch.setenv("COLUMNS", f"{width}")
    name = "q\rads \x1b[31m\x9b2J\n"
    print_table(("consumer", "pin"), [(name, 1)], title=name)
    say(name)
    note(name)
    output, log = capsys.readouterr()
    shown = r"q\rads \x1b[31m\x9b2J\n"
    assert re.sub(r"\x1b\[1m|\x1b\[0m", "", output).count(r"\x1b[31m") == 3
    assert output.endswith(f"\n{shown}\n")
    assert log == f"{shown}\n"
    assert not re.search(r"\r|\x9b|\x1b\[31|q\n", output)
