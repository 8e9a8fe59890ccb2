"""A log line is one line, says what it was written for, and holds no secret."""

import json
import logging
import logging.config
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast import logs
from backcast.logs import JsonFormatter, Seldom, TextFormatter, Trouble, one_line, redact

SECRET = "bc_0011aabb_Zm9vYmFyYmF6cXV4-_Zm9vYmFyYmF6cXV4"
FORMATTERS = pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])


def record(message: str, *args: object, level: int = logging.INFO, **more: Any) -> Any:
    name = more.pop("name", "service.poller")
    made = logging.LogRecord(name, level, "file.py", 1, message, args, more.pop("exc_info", None))
    made.__dict__.update(more)
    return made


def failed(error: Exception) -> Any:
    """Return the ``exc_info`` of an error that was raised."""
    try:
        raise error
    except Exception:
        return sys.exc_info()


@contextmanager
def set_to(variable: ContextVar[str | None], value: str) -> Iterator[None]:
    token = variable.set(value)
    yield
    variable.reset(token)


def test_json_says_when_what_and_for_what() -> None:
    with set_to(logs.request_id, "r-1"), set_to(logs.trace_id, "ab" * 16):
        line = JsonFormatter().format(record("%d ids", 7, fields={"version": 2, "consumer": None}))
    document = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document.pop("time"))
    assert document.pop("process") > 0
    assert document == {
        "level": "INFO",
        "logger": "service.poller",
        "message": "7 ids",
        "request_id": "r-1",
        "trace_id": "ab" * 16,
        "version": 2,
        "consumer": None,
    }


def test_json_of_an_error_has_its_kind_and_its_stack() -> None:
    line = JsonFormatter().format(record("odd\n", exc_info=failed(KeyError("x"))))
    document = json.loads(line)
    assert (document["message"], document["error_type"]) == ("odd", "KeyError")
    assert document["stack"].startswith("Traceback (most recent call last):\n")
    assert document["stack"].endswith("KeyError: 'x'")


@given(st.text(st.characters()))
def test_json_is_one_line_whatever_the_message(text: str) -> None:
    line = JsonFormatter().format(record("%s", text))
    assert "\n" not in line
    assert isinstance(json.loads(line.encode())["message"], str)


def test_text_is_one_line_and_a_traceback_below() -> None:
    with set_to(logs.request_id, "r-1"):
        line = TextFormatter().format(record("two\nlines\n"))
    assert line.endswith(r" service.poller: two\nlines request_id=r-1")
    shown = TextFormatter().format(record("odd", exc_info=failed(KeyError("x"))))
    assert shown.splitlines()[1] == "Traceback (most recent call last):"


@given(st.text(st.characters()))
def test_text_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    raised = record("odd", exc_info=failed(RuntimeError(text)))
    lines = [
        TextFormatter().format(record("%s", text)),
        *TextFormatter().format(raised).split("\n"),
    ]
    for line in lines:
        found = {character for character in line if category(character) in {"Cc", "Zl", "Zp"}}
        assert found <= {"\t"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("q\rINFO forged \x1b[31m", r"q\rINFO forged \x1b[31m"),
        ("a\nb\x85c\u2028d\x9b31m\x7f\0", r"a\nb\x85c\u2028d\x9b31m\x7f\x00"),
        ("\u202egnp.exe\u2069", r"\u202egnp.exe\u2069"),
        ("id\t0.5 é 日本 \\n", "id\t0.5 é 日本 \\n"),
    ],
)
def test_controls_are_escaped(text: str, shown: str) -> None:
    assert one_line(text) == shown


@FORMATTERS
@pytest.mark.parametrize(
    "text",
    [
        f"a key {SECRET}.",
        f"Authorization: Bearer {SECRET}",
        "{'Authorization': 'Basic hunter2hunter2'}",
        "postgresql+psycopg://backcast:hunter2@db/registry does not answer",
        "redis://:hunter2@cache:6379/0",
        "redis://cache:hun/ter2@x@cache:6379/0",
        "rediss://cache/0?password=hunter2&db=1",
    ],
)
def test_no_secret_is_written(formatter: logging.Formatter, text: str) -> None:
    lines = [
        formatter.format(record("%s", text)),
        formatter.format(record("odd", exc_info=failed(RuntimeError(text)))),
        formatter.format(record("odd", fields={"consumer": text})),
    ]
    with set_to(logs.request_id, f"x{SECRET}"):
        lines.append(formatter.format(record("named by its caller")))
    for line in lines:
        assert "hunter2" not in line
        assert "hun/ter2" not in line
        assert SECRET.split("_", 2)[2] not in line
        assert "Zm9v" not in line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {SECRET}, please", "see bc_0011aabb_…, please"),
        (f"x{SECRET}/{SECRET}", "xbc_0011aabb_…/bc_0011aabb_…"),
        (f"{SECRET[:20]} was cut", "bc_0011aabb_… was cut"),
        (SECRET.replace("_0011aabb_", "_0011aab_"), "bc_0011aab_…"),
        ("the id abc_def_0 of bc_x_1", "the id abc_def_0 of bc_x_1"),
        ("key 0011aabb of abc_def", "key 0011aabb of abc_def"),
    ],
)
def test_keys_are_taken_out_of_texts(text: str, shown: str) -> None:
    assert redact(text) == shown


GREEDY = re.compile(r"://([^\s/:@]*):\S*@")  # what is to be found, however long that takes


@given(st.lists(st.sampled_from(["://", ":", "/", "@", "ab", " ", "\n", "\x85"])).map("".join))
def test_a_password_ends_with_the_last_at_of_its_word(text: str) -> None:
    assert redact(text) == GREEDY.sub(r"://\1:…@", text)


@pytest.mark.parametrize("ends", [("", ""), ("@", ""), ("", "@")])
@pytest.mark.parametrize("word", ["://:", "://x:", "://", "://: ", "://:@", "bc_0_", "bearer "])
def test_secrets_are_looked_for_in_one_pass(word: str, ends: tuple[str, str]) -> None:
    text = ends[0] + word * 40_000 + ends[1]
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 2  # it takes a tenth; every word anew, 8 seconds


def test_what_is_no_secret_is_left() -> None:
    for text in (
        "The registry postgresql+psycopg://db:5432/registry does not answer: refused.",
        "key 0011aabb is revoked",
        "snapshot v3-20261120T091500-1f0a6c2e.0",
        "The Authorization header must be `Bearer <key>`.",
    ):
        assert redact(text) == text
    assert redact(SECRET) == "bc_0011aabb_…"


def test_libraries_warn_once_a_minute() -> None:
    seldom, now = Seldom(), 1000.0

    def passes(**more: Any) -> bool:
        more = {"name": "opentelemetry.exporter", "level": logging.WARNING, **more}
        return seldom.filter(record("Transient error %s", now, **more))

    assert passes()
    assert not passes()
    assert passes(name="opentelemetry.sdk")
    assert passes(level=logging.INFO)
    assert passes(exc_info=failed(KeyError("x")))
    assert all(passes(name="service.engine") for _ in range(3))


class Told:
    """A trouble, a clock that is set by hand, and what was logged."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now, self._caplog = 0.0, caplog
        caplog.set_level(logging.INFO)
        self.trouble = Trouble(logging.getLogger("tests"), "looking", lambda: self.now)

    def lines(self) -> list[tuple[str, str]]:
        found = [(r.levelname, r.getMessage()) for r in self._caplog.records]
        self._caplog.clear()
        return found


def test_trouble_is_told_when_it_begins_and_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Told(caplog)
    for told.now in range(1000):
        told.trouble.note("gone")
    assert told.lines() == [("WARNING", "looking: gone")]
    told.trouble.over()
    told.trouble.over()
    assert told.lines() == [("INFO", "looking works again")]
    told.trouble.note("KeyError", KeyError("x"))
    assert told.lines() == [("ERROR", "looking: KeyError")]


def test_trouble_that_comes_and_goes_does_not_flood_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Told(caplog)
    for half_second in range(240):
        told.now = half_second / 2
        if half_second % 2:
            told.trouble.over()
        else:
            told.trouble.note("refused" if half_second % 4 else "timed out")
    lines = [line for _, line in told.lines()]
    assert lines.count("looking: refused") == lines.count("looking: timed out") == 2
    assert lines.count("looking works again") == 4


def test_trouble_with_ever_new_words_does_not_flood_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Told(caplog)
    for number in range(59):
        told.now = float(number)
        told.trouble.note(f"attempt {number} failed")
    assert len(told.lines()) == 10


@pytest.mark.parametrize("format", ["text", "json"])
def test_logging_is_one_line_a_record_on_standard_error(format: str) -> None:
    program = (
        "import logging, logging.config; from backcast.logs import configuration;"
        f"logging.config.dictConfig(configuration({format!r}));"
        "logging.getLogger('service.poller').warning('trouble %d', 7)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "WARNING" in ended.stderr
    if format == "json":
        assert json.loads(ended.stderr)["message"] == "trouble 7"
    else:
        assert "service.poller: trouble 7" in ended.stderr
