"""What the commands print: tables and JSON on standard output, progress on standard error."""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import orjson
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from backcast.logs import one_line, redact, writes_json

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
WIDTH_OF_FILES = 160
"""How wide a table is that no terminal shows."""


class Advance(Protocol):
    """Report that ``done`` units are finished, with a few words on how it goes."""

    def __call__(self, done: int, note: str = "") -> None: ...


def say(text: str) -> None:
    """Print one line, with no character that a terminal would obey."""
    sys.stdout.write(f"{one_line(text)}\n")
    sys.stdout.flush()


def note(text: str, level: int = logging.INFO) -> None:
    """Tell on standard error, as a line of its own; as a log record where those are JSON."""
    if writes_json():
        logger.log(level, "%s", text)
    else:
        print(redact(one_line(text)), file=sys.stderr, flush=True)  # noqa: T201


def print_json(data: object) -> None:
    """Print ``data`` for a script, one JSON document, indented."""
    sys.stdout.write(orjson.dumps(data, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> None:
    """Print a table for a person: text to the left, numbers to the right.

    Only between words is a cell broken. On a terminal too narrow for that, each row is printed as
    a list of its cells, so that an id can always be copied.
    """
    rows = [list(row) for row in rows]
    console = Console(
        highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES
    )
    if title:
        console.print(one_line(title), style="bold")
    texts = [["-" if cell is None else one_line(str(cell)) for cell in row] for row in rows]
    by_column = [list(cells) for cells in zip(columns, *texts, strict=True)]
    for padding in (1, 0):
        widths = _fit(by_column, console.width - (1 + 2 * padding) * len(columns) - 1)
        if widths is not None:
            break
    else:
        _print_lists(columns, texts)
        return
    table = Table(padding=(0, padding))
    for at, column in enumerate(columns):
        numeric = all(_is_numeric(row[at]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", width=widths[at])
    for row in texts:
        table.add_row(*row)
    console.print(table)


def _fit(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Return how wide each column is, the widest made narrower first; None where words break."""
    widths = [max(map(cell_len, cells)) for cells in columns]
    words = [max(cell_len(word) for cell in cells for word in cell.split(" ")) for cells in columns]
    if sum(words) > room:
        return None
    while sum(widths) > room:
        _, at = max((widths[i], i) for i in range(len(widths)) if widths[i] > words[i])
        widths[at] -= 1
    return widths


def _print_lists(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    longest = max(map(cell_len, columns))
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            if cell not in {"-", ""}:
                say(f"{column}{' ' * (longest - cell_len(column))}  {cell}")
        say("")


_NUMBER = re.compile(r"-?$|[+\-−]?\d[\d.,:e+-]*(?!\w)")  # not an id that begins with digits


def _is_numeric(cell: object) -> bool:
    return not isinstance(cell, str) or _NUMBER.match(cell) is not None


@contextmanager
def interruptible(last_words: str | Callable[[], str]) -> Iterator[None]:
    """Answer Ctrl-C with one line on standard error and exit status 130.

    The line is worked out then, where it is a function.

    An interrupt may arrive as another error's cause: an extension that is called back by C code
    cannot always pass it on as it is.
    """
    try:
        yield
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        line = last_words if isinstance(last_words, str) else last_words()
        note(line, logging.WARNING)
        raise typer.Exit(130) from None


def _is_interrupt(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def progress(what: str, total: int | None, *, estimated: bool = True) -> Iterator[Advance]:
    """Show progress on standard error: a bar on a terminal, else a line every few seconds.

    The bar guesses the time left from equal units, unless the notes tell it better.
    """
    if sys.stderr.isatty() and not writes_json():
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *([TimeRemainingColumn()] if estimated else []),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        ) as bars:
            task = bars.add_task(what, total=total, note="")
            yield lambda done, note="": bars.update(task, completed=done, note=note)
    else:
        lines = _Lines(what, total)
        yield lines
        lines.close()


class _Lines:
    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._printed_at, self._last = 0.0, ""

    def __call__(self, done: int, note: str = "") -> None:
        of = "" if self._total is None else f"/{self._total}"
        self._last = f"{self._what} {done}{of} {note}".rstrip()
        if time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print()

    def close(self) -> None:
        if self._last:
            self._print()

    def _print(self) -> None:
        note(self._last)
        self._printed_at, self._last = time.monotonic(), ""
