"""However many scrape, little is written, and nobody is shown what is old."""

import time
from itertools import count, pairwise

import anyio

from service.metrics.exposition import Rendering
from service.metrics.scrapes import Scrapes

TEXT, OPEN = "text/plain", "application/openmetrics-text"


class Writing:
    """Says how often it was asked, and takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self._number, self.begun = seconds, count(1), list[float]()

    def __call__(self, rendering: Rendering) -> bytes:
        self.begun.append(time.monotonic())
        time.sleep(self.seconds)
        return f"{rendering.partition(';')[0]} {next(self._number)}".encode()


def test_all_who_wait_share_what_is_begun_then() -> None:
    writing = Writing(0.1)
    scrapes, found = Scrapes(writing), list[bytes]()

    async def scrape() -> None:
        found.append((await scrapes.text(TEXT))[0])

    async def crowd() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(scrape)

    anyio.run(crowd)
    assert len(found) == 100
    assert set(found) <= {b"text/plain 1", b"text/plain 2"}  # most came when the first was begun


def test_those_who_make_up_versions_share_it_too() -> None:
    writing = Writing(0.1)
    scrapes, found = Scrapes(writing), list[bytes]()

    async def scrape(accept: str) -> None:
        found.append((await scrapes.text(accept))[0])

    async def crowd() -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(scrape, f"{OPEN};version=1.0.{number}")

    anyio.run(crowd)
    assert len(found) == 20
    assert len(writing.begun) <= 4  # two of each rendering


def test_nobody_is_given_what_was_begun_before() -> None:
    scrapes = Scrapes(Writing())

    async def one_after_another() -> list[bytes]:
        return [(await scrapes.text(accept))[0] for accept in (TEXT, TEXT, OPEN, TEXT)]

    assert anyio.run(one_after_another) == [
        *(b"text/plain 1", b"text/plain 2", b"application/openmetrics-text 3", b"text/plain 4")
    ]


def test_between_two_there_is_a_pause() -> None:
    writing = Writing(0.02)
    scrapes = Scrapes(writing)

    async def one_after_another() -> None:
        for _ in range(5):
            await scrapes.text(TEXT)

    anyio.run(one_after_another)
    pauses = [later - earlier for earlier, later in pairwise(writing.begun)]
    assert min(pauses) >= 0.075


def test_a_slow_one_keeps_nobody_long() -> None:
    writing = Writing(1.0)
    scrapes = Scrapes(writing)

    async def one_after_another() -> None:
        await scrapes.text(TEXT)
        writing.seconds = 0.0
        await scrapes.text(TEXT)

    anyio.run(one_after_another)
    assert writing.begun[1] - writing.begun[0] < 3  # and not 4
