"""What the readers of a Redis notice of a load is measured while that goes on."""

import numpy as np
from redis import Redis

from backcast.vectors import VectorBatch
from backcast.versions import Entity
from benchmarks.stores_beside import COLUMNS, beside
from tests.servers import own_redis


def test_readers_are_timed_during_each_act() -> None:
    rng, acts = np.random.default_rng(0), ["nothing", "load", "list the snapshots", "drop"]
    batches = [
        VectorBatch(
            Entity.ITEM,
            [f"{part} {row}" for row in range(5_000)],
            rng.standard_normal((5_000, 8), dtype=np.float32),
        )
        for part in range(4)
    ]
    with own_redis() as server, server.running(), Redis.from_url(server.url) as client:
        found = beside(server.url, "s1", batches)
        calls = client.info("commandstats")
        assert client.dbsize() == 0
    assert [noticed.act for noticed in found] == acts
    for noticed in found:
        assert 0 < noticed.median <= noticed.p99 <= noticed.longest
        assert len(noticed.row()) == len(COLUMNS)
    assert found[0].seconds >= 2
    assert calls["cmdstat_get"]["calls"] > 200
    assert calls["cmdstat_mset"]["calls"] == 20_000 / 250
