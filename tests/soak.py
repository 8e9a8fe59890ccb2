"""The soak on private servers, which it may stop: ``python -m tests.soak --minutes 5``.

Takes the options of ``benchmarks/soak.py``; with URLs, it is that.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from backcast.registry.schema import make_engine, upgrade
from benchmarks import soak
from benchmarks.soak_acts import Outage
from benchmarks.soak_readers import DATABASE, STORE
from tests import servers


@contextmanager
def on_own_servers(plan: soak.Plan) -> Iterator[soak.Plan]:
    """Yield the plan on servers of its own, the registry's schema made, that it may stop."""
    with servers.own_postgres() as postgres, servers.own_redis() as plain:
        redis = plain.with_options("--appendonly", "yes")
        with servers.Running(postgres) as database, servers.Running(redis) as store:
            engine = make_engine(postgres.url)
            upgrade(engine)
            engine.dispose()
            yield replace(
                plan,
                database_url=postgres.url,
                store_url=redis.url,
                outages={
                    DATABASE: Outage(database.stop, database.start),
                    STORE: Outage(store.stop, store.start),
                },
            )


def main() -> int:
    if any(argument.startswith("--database-url") for argument in sys.argv):
        return soak.main()
    parsed = soak.parse([*sys.argv[1:], "--database-url", "", "--store-url", ""])
    with on_own_servers(soak.plan_of(parsed)) as plan:
        return soak.run(plan)


if __name__ == "__main__":
    sys.exit(main())
