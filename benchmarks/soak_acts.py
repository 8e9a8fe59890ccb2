"""What goes on while the readers read: switches and their murder, changes of ids, outages."""

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import httpx2
from sqlalchemy.exc import SQLAlchemyError

from backcast.errors import BackcastError
from backcast.lifecycle import open_backcast, promote
from backcast.settings import Settings
from benchmarks.soak_checker import Fault, Finding
from benchmarks.soak_readers import DATABASE, STORE, Field
from benchmarks.soak_replicas import Replica
from benchmarks.soak_world import Deployed

CONVERGED_S = 2.0
"""Within this time all replicas follow a promotion."""

_REASON = "soak"
_FOLLOWED_S, _FINISHED_S = 30.0, 60.0
_SPAWNER = multiprocessing.get_context("forkserver")
_SPAWNER.set_forkserver_preload(["benchmarks.soak_acts", "redis", "psycopg"])


@dataclass(frozen=True)
class Outage:
    """How a server that the soak may stop is stopped and started."""

    stop: Callable[[], object]
    start: Callable[[], object]


def promote_aloud(settings: Settings, version: int, told: Connection) -> None:
    """Promote a version in this process, and tell every step to who may want to kill it."""
    with open_backcast(settings) as backcast:
        try:
            promote(
                backcast,
                version,
                actor=_REASON,
                force=True,
                reason=_REASON,
                report=lambda step, fraction: told.send(f"{step} {fraction}"),
            )
        except BackcastError as error:
            told.send(f"refused {error.code}")
    told.close()


class Switcher:
    """Promotes, refreshes and rolls back, one after the other, each in one of several ways."""

    def __init__(self, field: Field, settings: Settings, seed: int, pause_s: float) -> None:
        self._field, self._settings = field, settings
        self._random, self._pause_s = random.Random(seed), pause_s
        self._http = httpx2.Client(headers=field.headers, timeout=20)

    def run(self) -> None:
        """Switch until the soak stops."""
        while not self._field.stopping.wait(self._random.uniform(0, 2 * self._pause_s)):
            self.act()

    def act(self) -> None:
        """Do one switch, whatever becomes of it, and see that every replica follows."""
        world, before = self._field.world, self._field.world.live
        act = self._random.choice([self._promote, self._promote, self._refresh])
        try:
            act()
        except BackcastError as error:  # the database or the store went away meanwhile
            self._field.tally.count(self._field.tally.allowed, f"switch: {error.code}")
        self._look()
        for deployed in world.history[before.generation :]:
            self._field.tally.count(self._field.tally.switches, deployed.kind)
        if world.live.generation > before.generation:
            self._see_followed(world.live)

    def start(self) -> None:
        """Make version 0 live."""
        self._field.world.publish(0)
        self._by_process(0, killed=False)
        self._look()

    def _promote(self) -> None:
        live = self._field.world.live.version
        others = [version for version in self._field.world.ledger.models.dims if version != live]
        self._bring_live(self._random.choice(others))

    def _refresh(self) -> None:
        self._bring_live(self._field.world.live.version)

    def _bring_live(self, version: int) -> None:
        self._field.world.publish(version)
        if self._random.random() < 0.5:
            self._by_process(version, killed=self._random.random() < 0.5)
        else:
            order = {"expected_live": self._field.world.live.version}
            self._by_replica(f"/admin/versions/{version}/promote", order)

    def _by_process(self, version: int, *, killed: bool) -> None:
        """Promote in a process of its own, and kill it at some step."""
        told, tells = _SPAWNER.Pipe(duplex=False)
        process = _SPAWNER.Process(target=promote_aloud, args=(self._settings, version, tells))
        process.start()
        tells.close()
        steps = self._random.randint(1, 5) if killed else 1_000
        try:
            for _ in range(steps):
                words = told.recv()
                if words.startswith("refused"):
                    self._field.tally.count(self._field.tally.allowed, f"switch: {words}")
            time.sleep(self._random.uniform(0, 0.02))
            process.kill()
            self._field.tally.count(
                self._field.tally.injected, f"kill -9 of a promotion at {words.split()[0]}"
            )
        except EOFError:  # it ended by itself
            pass
        process.join()
        process.close()

    def _by_replica(self, path: str, order: Mapping[str, Any]) -> None:
        """Order a switch over HTTP, and wait for its operation, whoever may finish it."""
        tally, replica = self._field.tally, self._random.choice(self._field.replicas)
        body = {"force": True, "reason": _REASON, **order}
        try:
            response = self._http.post(f"{replica.url}{path}", json=body)
        except httpx2.TransportError:
            tally.count(tally.allowed, "switch: no connection")
            return
        if response.status_code != 202:
            tally.count(tally.allowed, f"switch: {response.status_code} {_code(response)}")
            return
        deadline = time.monotonic() + _FINISHED_S
        while not self._is_finished(response.json()["id"]):
            if time.monotonic() > deadline:
                tally.accuse([Finding(Fault.LOST, f"operation {response.text} never ends")])
                return
            time.sleep(0.1)

    def _is_finished(self, operation: str) -> bool:
        replica = self._random.choice(self._field.replicas)
        try:
            found = self._http.get(f"{replica.url}/admin/operations/{operation}")
        except httpx2.TransportError:
            return False
        if found.status_code != 200:
            return False
        document = found.json()
        if document["state"] == "failed":
            code = document["error"]["code"]
            self._field.tally.count(self._field.tally.allowed, f"switch: failed, {code}")
        return document["state"] in {"succeeded", "failed"}

    def _look(self) -> None:
        """Read the registry, which may be away for a while."""
        while not self._field.stopping.is_set():
            try:
                self._field.world.follow()
                return
            except SQLAlchemyError:
                time.sleep(0.1)

    def _see_followed(self, live: Deployed) -> None:
        """Wait until every undisturbed replica serves what is live; note how long they took."""
        waiting = list(self._field.replicas)
        while waiting and not self._field.stopping.is_set():
            if time.monotonic() > live.seen_at + _FOLLOWED_S:
                names = ", ".join(replica.name for replica in waiting)
                text = f"{names} never served {live.snapshot}"
                self._field.tally.accuse([Finding(Fault.LOST, text)])
                return
            waiting = [replica for replica in waiting if not self._follows(replica, live)]
            time.sleep(0.01)

    def _follows(self, replica: Replica, live: Deployed) -> bool:
        """Return whether a replica serves what is live, or need not be waited for."""
        served, now = replica.serves(), time.monotonic()
        if self._field.absences.overlap((DATABASE, STORE, replica.name), live.seen_at, now):
            return True
        follows = served is not None and served.startswith(f"{live.snapshot}.")
        if follows:
            self._field.tally.followed(now - live.seen_at)
        return follows


def _code(response: httpx2.Response) -> str:
    return str(response.json()["type"]).rpartition(":")[2]


class Breaker:
    """Kills and stalls replicas, stops servers, one at a time."""

    def __init__(
        self, field: Field, outages: Mapping[str, Outage], seed: int, pause_s: float
    ) -> None:
        self._field, self._outages = field, outages
        self._random, self._pause_s = random.Random(seed), pause_s

    def run(self) -> None:
        """Break something until the soak stops; every kind comes once in a while."""
        kinds: list[Callable[[], None]] = []
        while not self._field.stopping.wait(self._random.uniform(0, 2 * self._pause_s)):
            if not kinds:
                kinds = [self._kill, self._stall, self._kill]
                kinds += [lambda part=part: self._stop(part) for part in self._outages]  # type: ignore[misc]
                self._random.shuffle(kinds)
            kinds.pop()()

    def _kill(self) -> None:
        replica = self._random.choice(self._field.replicas)
        self._field.tally.count(self._field.tally.injected, "kill -9 of a replica")
        with self._field.absences.of(replica.name):
            replica.kill()
            time.sleep(self._random.uniform(0, 1))
            replica.start()
            replica.wait(self._field.stopping)

    def _stall(self) -> None:
        replica = self._random.choice(self._field.replicas)
        self._field.tally.count(self._field.tally.injected, "SIGSTOP of a replica")
        with self._field.absences.of(replica.name):
            replica.signal(signal.SIGSTOP)
            time.sleep(self._random.uniform(0.5, 4))
            replica.signal(signal.SIGCONT)

    def _stop(self, part: str) -> None:
        self._field.tally.count(self._field.tally.injected, f"stop of the {part}")
        with self._field.absences.of(part):
            self._outages[part].stop()
            time.sleep(self._random.uniform(0.3, 3))
            self._outages[part].start()
