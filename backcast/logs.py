"""The log: one line a record, as text for people or as JSON for machines, never with a secret.

What a line was written for is told by two context variables, which every thread that works on a
request shares.
"""

import logging
import re
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that is being worked on."""

trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""The trace (W3C, 32 hexadecimal digits) that this work belongs to."""

logger = logging.getLogger(__name__)

_QUIET_S = 60.0
_MOST_TOLD = 10  # different troubles of one task within that time
_FOREIGN = ("opentelemetry", "uvicorn")  # whose warnings may come as fast as requests do

_SECRETS = (
    (re.compile(r"bc_([0-9a-f]{8})_[\w-]+"), r"bc_\1_…"),  # the prefix of a key is public
    (re.compile(r"\bbc_(\w{1,8})_[\w-]{20,}"), r"bc_\1_…"),  # and was mistyped
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 …"),
    (re.compile(r"(?i)\b(password|passwd|secret|token)=[^\s&'\"]+"), r"\1=…"),
)

# A password may hold anything but a blank, so the last @ of a word ends it. One pattern that looks
# for that @ would read the rest of the word again from each "://x:", and a stranger's path may have
# thousands of them.
_WORD = re.compile(r"\S+")
_PASSWORD = re.compile(r"://([^/:@]*):.*")

# Control characters but the tab, ends of lines, and what turns the order of a text.
_CONTROLS = re.compile(r"[\x00-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """Return ``text`` without keys, Authorization headers and passwords in URLs."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return _WORD.sub(_without_password, text) if "://" in text else text


def _without_password(word: re.Match[str]) -> str:
    before, at, host = word[0].rpartition("@")
    return _PASSWORD.sub(r"://\1:…", before, count=1) + at + host


def one_line(text: str) -> str:
    """Return ``text`` with all escaped that ends a line, or that a terminal would obey."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def configuration(format: str) -> dict[str, Any]:
    """Return the configuration of a process that logs to standard error, as ``text`` or ``json``.

    It is data, for ``logging.config``: uvicorn hands it on to its workers.
    """
    formatter = JsonFormatter if format == "json" else TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "filters": {"seldom": {"()": Seldom}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "line",
                "filters": ["seldom"],
            }
        },
        "root": {"handlers": ["stderr"], "level": "INFO"},
        "loggers": {"alembic": {"level": "WARNING"}},
    }


class TextFormatter(logging.Formatter):
    """Writes a record as one line, and a traceback below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line, and what it was written for."""
        line = one_line(super().formatMessage(record).rstrip())
        return " ".join([line, *(f"{name}={value}" for name, value in _occasion().items())])

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and its traceback."""
        return redact("\n".join(map(one_line, super().format(record).split("\n"))))


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object on one line.

    ``extra={"fields": {…}}`` adds members to it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": _rfc3339(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage().rstrip(),
            "process": record.process,
            **_occasion(),
            **getattr(record, "fields", {}),
            **self._error(record),
        }
        return orjson.dumps({name: _shown(value) for name, value in line.items()}).decode()

    def _error(self, record: logging.LogRecord) -> dict[str, str]:
        raised = record.exc_info
        if not raised or raised[0] is None:
            return {}
        return {"error_type": raised[0].__qualname__, "stack": self.formatException(raised)}


def _occasion() -> dict[str, str]:
    found = {"request_id": request_id.get(), "trace_id": trace_id.get()}
    return {name: value for name, value in found.items() if value is not None}


def _rfc3339(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return moment.replace("+00:00", "Z")


def _shown(value: object) -> object:
    if value is None or isinstance(value, (int, float)):
        return value
    # A lone surrogate, from a file's name for instance, is no JSON.
    return redact(str(value).encode(errors="backslashreplace").decode())


class Seldom(logging.Filter):
    """Lets a warning of a library through once a minute: a trouble of theirs would flood the log.

    Errors with a traceback come through always.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[tuple[str, object], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be logged."""
        foreign = record.name.partition(".")[0] in _FOREIGN
        if not foreign or record.levelno < logging.WARNING or record.exc_info:
            return True
        kind, now = (record.name, record.msg), time.monotonic()
        if now - self._told.get(kind, -_QUIET_S) < _QUIET_S:
            return False
        self._told[kind] = now
        return True


class Trouble:
    """Tells of what goes wrong again and again when it begins and when it is over.

    It is told once for as long as it stays the same; where it comes and goes, or changes its
    words, once a minute.
    """

    def __init__(
        self, logger: logging.Logger, what: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger, self._what, self._clock = logger, what, clock
        self._last: str | None = None
        self._open = False  # told, and not yet that it is over
        self._told: dict[str, float] = {}

    def note(self, trouble: str, unforeseen: Exception | None = None) -> None:
        """Take note of a trouble; an ``unforeseen`` error is an ERROR, with its traceback."""
        if trouble == self._last:
            return
        self._last = trouble
        now = self._clock()
        self._told = {old: when for old, when in self._told.items() if now - when < _QUIET_S}
        if trouble in self._told or len(self._told) >= _MOST_TOLD:
            return
        self._told[trouble], self._open = now, True
        level = logging.WARNING if unforeseen is None else logging.ERROR
        self._logger.log(level, "%s: %s", self._what, trouble, exc_info=unforeseen)

    def over(self) -> None:
        """Take note that it works."""
        if self._open:
            self._logger.info("%s works again", self._what)
        self._last, self._open = None, False


def write_json() -> None:
    """Let this process write nothing but JSON to standard error: a command that is run as a job."""
    import logging.config

    logging.config.dictConfig(configuration("json"))
    logging.captureWarnings(True)
    sys.excepthook = _log_unforeseen


def writes_json() -> bool:
    """Return whether standard error is for JSON only."""
    return any(isinstance(h.formatter, JsonFormatter) for h in logging.getLogger().handlers)


def _log_unforeseen(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logger.critical("An unforeseen error", exc_info=(kind, error, traceback))
