"""A service with versions in every state, for strangers to talk to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from backcast.lifecycle import deprecate, erase, retire, upsert_batches
from backcast.registry.database import utc_now
from backcast.vectors import VectorBatch
from backcast.versions import Entity, Scope
from service.app import create_app
from tests.service_support import publish_ids, running, secret_of
from tests.support import SHARED_ID, Home, build_home

IDS = ("B00005N7P0", "B0000AZW7F", "A1KLRMWW2FWPL4", "0", "a/b", SHARED_ID)
"""What the snapshots hold, the ids of the document's examples among them."""

LIVE = 3
_DIMS, _PARENTS = (3, 4, 5, 4, 6, 6, 6), (None, 0, 1, 2, 1, 3, 3)
DIM = _DIMS[LIVE]


@dataclass(frozen=True)
class World:
    """A running service.

    Version 0 is retired, 1 deprecated, 2 superseded, 3 live with changes on it, 4 off its chain,
    5 can be promoted, and nothing was published of 6.
    """

    home: Home
    url: str
    admin: str
    read: str


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[World]:
    """Yield such a service on a loopback port."""
    chosen = {"grace_seconds": 3600.0, "poll_seconds": 0.05, **settings}
    with build_home(folder, _DIMS, parents=_PARENTS, published=False, **chosen) as home:
        _fill(home)
        read, admin = (secret_of(home, scope) for scope in (Scope.READ, Scope.ADMIN))
        with running(create_app(home.settings)) as url:
            yield World(home, url, admin, read)


def _fill(home: Home) -> None:
    for version in range(6):
        publish_ids(home, version, IDS)
    for version in home.chain(LIVE)[::-1]:
        home.promote(version)
    backcast, who = home.backcast, "tests"
    retire(backcast, 0, actor=who, idle=timedelta(0), force=True, reason="old")
    deprecate(backcast, 1, sunset_at=utc_now() + timedelta(days=30), actor=who, reason="use 3")
    vectors = np.ones((2, home.dims[LIVE]), np.float32)
    changed = VectorBatch(Entity.ITEM, ["new", IDS[0]], vectors)
    upsert_batches(backcast, [changed], actor=who, most_changed=100, expected_live=LIVE)
    erase(backcast, Entity.USER, [IDS[-1]], actor=who, grace=timedelta(hours=1))
