"""What reads bytes that others wrote. Each reader accepts them or refuses them; nothing else.

A refusal is one of Backcast's own errors, or what the service answers with a problem document.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from backcast.errors import BackcastError
from service.arrow import UnreadableIds

REFUSALS = (BackcastError, RequestValidationError, HTTPException, UnreadableIds)

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """A reader, and contents that it accepts, more or less.

    ``prepare`` makes the reader in an empty folder; it raises one of ``REFUSALS``, or returns.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    prepare: Callable[[Path], Read]

    def reader(self, folder: Path) -> Callable[[bytes], bool]:
        """Return what tells whether contents are accepted, and raises what nobody may see."""
        read = self.prepare(folder)

        def accepts(content: bytes) -> bool:
            try:
                read(content)
            except REFUSALS as refusal:
                _check_told(refusal)
                return False
            return True

        return accepts


def plain(read: Read) -> Callable[[Path], Read]:
    """Return how a reader is prepared that needs no folder."""
    return lambda _folder: read


def _check_told(refusal: Exception) -> None:
    """Demand that a refusal can be shown: not empty, not long, no traceback."""
    if isinstance(refusal, RequestValidationError):
        told = "\n".join(str(error["msg"]) for error in refusal.errors()[:20])  # all that is told
    else:
        told = str(refusal)
    if isinstance(refusal, HTTPException):
        assert 400 <= refusal.status_code < 500, told
    assert told.strip(), "an error says nothing"
    assert len(told) < 20_000, f"an error of {len(told)} characters"
    assert "Traceback" not in told
