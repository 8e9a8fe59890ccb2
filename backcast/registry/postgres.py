"""Connections to PostgreSQL that wait for no server longer than a stated time.

The server's own time limits do not help where the server itself hangs, and the kernel of its host
goes on answering for it: only the client can tell, by its clock.
"""

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import psycopg
from sqlalchemy import Connection, Engine, event, text

CONNECT_S = 3
STATEMENT_S = 10.0
IDLE_S = 60.0
"""How long a process may sleep within a transaction, whose locks others wait for."""

POOL_S = 5.0


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is closed when an answer takes longer than ``patience`` seconds."""

    patience: float | None = STATEMENT_S

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """Run a step of the protocol; raise OperationalError where the server takes too long."""
        bounded = gen if self.patience is None else self._bounded(gen, self.patience)
        return super().wait(bounded, *args, **options)

    def _bounded(self, gen: Generator[Any, Any, Any], patience: float) -> Generator[Any, Any, Any]:
        deadline = time.monotonic() + patience
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    self.pgconn.finish()  # an answer that comes yet is nobody's
                    raise psycopg.OperationalError(f"no answer within {patience:g} s")
                wanted = gen.send(ready)
        except StopIteration as ended:
            return ended.value


def limits_beside(query: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits that a URL's ``query`` does not set itself, as arguments of ``connect``."""
    idle = f"-c idle_in_transaction_session_timeout={IDLE_S * 1000:.0f}"
    limits = {
        "connect_timeout": CONNECT_S,
        "options": f"-c statement_timeout={STATEMENT_S * 1000:.0f} {idle}",
    }
    return {name: limit for name, limit in limits.items() if name not in query}


def bound(engine: Engine) -> None:
    """Let every connection of ``engine`` be a patient one."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        return PatientConnection.connect(*arguments, **options)


@contextmanager
def unbound(connection: Connection) -> Iterator[None]:
    """Lift the limits of a connection within its transaction."""
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    driver = cast("PatientConnection", connection.connection.driver_connection)
    before, driver.patience = driver.patience, None
    try:
        yield
    finally:
        driver.patience = before
