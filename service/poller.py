"""A task done again and again in the background, whatever becomes of it each time."""

import logging
from collections.abc import Callable
from threading import Event, Thread
from typing import Self

from backcast.errors import BackcastError
from backcast.logs import Trouble

logger = logging.getLogger(__name__)


class Poller:
    """Calls ``task`` every ``seconds`` on a thread of its own, from entering to leaving the block.

    Errors are logged, see ``Trouble``, and the next call is made all the same. ``failed`` is told
    of each.
    """

    def __init__(
        self,
        name: str,
        task: Callable[[], object],
        seconds: float,
        failed: Callable[[Exception], object] = lambda _: None,
    ) -> None:
        self._task, self._seconds, self._failed = task, seconds, failed
        self._stopping = Event()
        self._trouble = Trouble(logger, name)
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
            self._failed(error)
            self._trouble.note(error.message)
        except Exception as error:  # the edge of a thread: nobody above could see the error
            self._failed(error)
            self._trouble.note(repr(error), error)
        else:
            self._trouble.over()

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            self.attempt()
