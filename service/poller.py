"""A task done again and again in the background, whatever becomes of it each time."""

import logging
from collections.abc import Callable
from threading import Event, Thread
from typing import Self

from backcast.errors import BackcastError

logger = logging.getLogger(__name__)


class Poller:
    """Calls ``task`` every ``seconds`` on a thread of its own, from entering to leaving the block.

    An error is logged once for as long as it stays the same, and the next call is made all the
    same.
    """

    def __init__(self, name: str, task: Callable[[], object], seconds: float) -> None:
        self._name, self._task, self._seconds = name, task, seconds
        self._stopping = Event()
        self._trouble: str | None = None
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def attempt(self) -> None:
        """Do the task once; an error is logged, not raised."""
        try:
            self._task()
        except BackcastError as error:
            self._note(error.message)
        except Exception as error:  # the edge of a thread: nobody above could see the error
            self._note(repr(error), unforeseen=error)
        else:
            self._note(None)

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            self.attempt()

    def _note(self, trouble: str | None, *, unforeseen: Exception | None = None) -> None:
        if trouble == self._trouble:
            return
        if trouble is None:
            logger.info("%s works again", self._name)
        else:
            logger.warning("%s: %s", self._name, trouble, exc_info=unforeseen)
        self._trouble = trouble
