"""A task in the background goes on, whatever becomes of it."""

import logging
import threading

import pytest

from backcast.errors import StoreError
from service.poller import Poller


def test_task_is_done_again_and_again_until_the_block_ends() -> None:
    calls = threading.Semaphore(0)
    with Poller("counting", calls.release, 0.001):
        for _ in range(3):
            assert calls.acquire(timeout=10)
    while calls.acquire(blocking=False):
        pass
    assert not calls.acquire(timeout=0.05)


@pytest.mark.parametrize("error", [StoreError("gone"), KeyError("odd")], ids=repr)
def test_errors_do_not_end_it(error: Exception) -> None:
    calls = threading.Semaphore(0)

    def fail() -> None:
        calls.release()
        raise error

    with Poller("failing", fail, 0.001):
        for _ in range(3):
            assert calls.acquire(timeout=10)


def test_the_same_error_is_logged_once_and_so_is_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcomes: list[Exception | None] = [
        StoreError("gone"),
        StoreError("gone"),
        StoreError("still gone"),
        None,
        None,
        KeyError("odd"),
    ]

    def task() -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    poller = Poller("looking", task, 1.0)
    with caplog.at_level(logging.INFO):
        for _ in range(6):
            poller.attempt()
    assert [record.getMessage() for record in caplog.records] == [
        "looking: gone",
        "looking: still gone",
        "looking works again",
        "looking: KeyError('odd')",
    ]
    tracebacks = [record.exc_info is not None for record in caplog.records]
    assert tracebacks == [False, False, False, True]
