"""The overload run, short: what is too much is refused as it should be, and memory is bounded."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.overload import BATCH, DIMS, peak
from benchmarks.overload_load import Tally, offer
from benchmarks.serving_data import Deployment, prepare, random_ids
from benchmarks.serving_processes import backcast_server, environment

ITEMS, WAITING, MIB = 20_000, 2, 1 << 20
LIMITS = {
    "BACKCAST_BATCHES_AT_ONCE": "1",
    "BACKCAST_BATCHES_WAITING": f"{WAITING}",
    "BACKCAST_MAX_BODY": f"{4 * MIB}",
}


def test_too_many_batches_are_refused_and_singles_served(tmp_path: Path) -> None:
    settings = prepare(tmp_path, Deployment("overload", DIMS, 1, ITEMS))
    ids = random_ids(ITEMS, BATCH)
    with backcast_server(environment(settings, 1, **LIMITS)) as server:

        def run(rate: float) -> tuple[Tally, Tally, float]:
            with peak(server) as memory:
                step = asyncio.run(
                    offer(server.url, ids, batch=BATCH, rate=rate, singles=50, seconds=2)
                )
            return step.batches, step.singles, memory[-1]

        batches, singles, before = run(1)
        assert (batches.served, singles.served) == (2, 100)
        batches, singles, after = run(150)
    assert batches.served
    assert batches.shed + batches.served == 300
    assert (batches.shed > 0, batches.hasty, batches.other) == (True, 0, {})
    assert singles.statuses == {200: 100}
    # Nothing for connections: those that are refused leave too soon to add up. The bound is 50 MiB;
    # with the limits it grows by 10, without them by 130 to 330.
    rows = BATCH * sum(DIMS) * 4 / MIB
    bound = (1 + WAITING) * (4 + rows) + (2 + WAITING) * 4
    assert after - before <= bound


def test_a_tally_knows_what_should_not_have_happened() -> None:
    tally = Tally()
    for status, says_when in ((200, False), (503, True), (503, False), (500, False), (0, False)):
        tally.note(status, says_when, 0.25)
    assert (tally.served, tally.shed, tally.hasty, tally.other) == (1, 2, 1, {500: 1, 0: 1})
    assert tally.milliseconds(99) == pytest.approx(250)
