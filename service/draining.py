"""How a replica stops: first it only says so, then it takes no more, then it finishes."""

import asyncio
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def draining(told: threading.Event, seconds: float) -> Iterator[None]:
    """On SIGTERM, set ``told``, and let the server hear of it ``seconds`` later.

    A second SIGTERM it hears of at once. Where no server waits for the signal, as in a test, or it
    runs on another thread, nothing is changed. To be called on the event loop.
    """
    stop = signal.getsignal(signal.SIGTERM)
    if not callable(stop) or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, server_stops = asyncio.get_running_loop(), stop

    def hear() -> None:
        delay = 0.0 if told.is_set() else seconds
        if not told.is_set():
            logger.info("told to stop: draining for %g s", seconds)
        told.set()
        loop.call_later(delay, server_stops, signal.SIGTERM, None)

    loop.add_signal_handler(signal.SIGTERM, hear)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, server_stops)
