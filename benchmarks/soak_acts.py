"""What goes on while the readers read: switches and their murder, changes of ids, outages."""

import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

import httpx2
import numpy as np
from redis import Redis

from backcast.errors import BackcastError
from backcast.lifecycle import Order, Promote, Refresh, Rollback, open_backcast, run_order
from backcast.settings import Settings
from backcast.versions import Entity
from benchmarks.soak_checker import Fault, Finding, split
from benchmarks.soak_ledger import Id
from benchmarks.soak_readers import CONTENT, DATABASE, STORE, Field
from benchmarks.soak_replicas import Replica, replica_environment
from benchmarks.soak_world import Deployed

CONVERGED_S = 2.0
"""Within this time every replica that nothing disturbs follows a promotion."""

_REASON = "soak"
_FOLLOWED_S, _FINISHED_S, _FILLED_S, _LOOKED_S = 30.0, 60.0, 60.0, 0.02
_SPAWNER = multiprocessing.get_context("forkserver")
_SPAWNER.set_forkserver_preload(["benchmarks.soak_acts", "redis", "psycopg"])


@dataclass(frozen=True)
class Outage:
    """How a server that the soak may stop is stopped and started."""

    stop: Callable[[], object]
    start: Callable[[], object]


def run_aloud(settings: Settings, order: Order, told: Connection) -> None:
    """Run an order as a command does, and tell every step to who may want to kill it."""
    try:
        with open_backcast(settings) as backcast:
            run_order(
                backcast,
                order,
                _REASON,
                timeout=settings.operation_timeout,
                report=lambda step, _fraction: told.send(step),
                say=lambda _line: told.send("waiting"),
            )
    except BackcastError as error:
        told.send(f"refused {error.code}")
    told.close()


class Switcher:
    """Promotes, refreshes and rolls back, one after the other, each in one of several ways."""

    def __init__(
        self,
        field: Field,
        settings: Settings,
        kill: Callable[[Replica], None],
        seed: int,
        pause_s: float,
        watchers: Sequence["Watcher"],
    ) -> None:
        self._field, self._settings, self._kill = field, settings, kill
        self._random, self._pause_s, self._watchers = random.Random(seed), pause_s, watchers
        self._http = httpx2.Client(headers=field.headers, timeout=20)

    def run(self) -> None:
        """Switch until the soak stops."""
        with self._http:
            while not self._field.stopping.wait(self._random.uniform(0, 2 * self._pause_s)):
                self.act()

    def act(self) -> None:
        """Do one switch, whatever becomes of it, and see that every replica follows."""
        world, before = self._field.world, self._field.world.live
        acts = [self._promote, self._there_and_back, self._refresh, self._compact, self._roll_back]
        try:
            self._random.choice(acts)()
        except BackcastError as error:  # the database or the store went away meanwhile
            self._field.tally.count(self._field.tally.allowed, f"switch: {error.code}")
        world.look()
        for deployed in world.history[before.generation :]:
            self._field.tally.count(self._field.tally.switches, deployed.kind)
        if world.live.generation > before.generation:
            self._wait_until_followed(world.live)

    def start(self) -> None:
        """Make version 0 live."""
        self._field.world.publish(0)
        self._by_process(Promote(0), killed=False)
        self._field.world.look()

    def _promote(self) -> None:
        live = self._field.world.live.version
        version = self._random.choice(
            [v for v in self._field.world.ledger.models.dims if v != live]
        )
        self._field.world.publish(version)
        path = f"/admin/versions/{version}/promote"
        body = {"expected_live": live, "force": True, "reason": _REASON}
        self._do(Promote(version, live, force=True, reason=_REASON), path, body)

    def _there_and_back(self) -> None:
        """Promote, and roll back at once, while the grace period lasts."""
        self._promote()
        self._field.world.look()
        self._roll_back()

    def _refresh(self) -> None:
        live = self._field.world.live.version
        self._field.world.publish(live)
        self._do(Refresh(live), f"/admin/versions/{live}/refresh", {"expected_live": live})

    def _compact(self) -> None:
        self._field.world.compact()
        live = self._field.world.live.version
        self._do(Refresh(live), f"/admin/versions/{live}/refresh", {"expected_live": live})

    def _roll_back(self) -> None:
        live = self._field.world.live.version
        body = {"expected_live": live, "reason": _REASON}
        self._do(Rollback(live, _REASON), "/admin/rollback", body)

    def _do(self, order: Order, path: str, body: Mapping[str, Any]) -> None:
        if self._random.random() < 0.5:
            self._by_process(order, killed=self._random.random() < 0.5)
        else:
            self._by_replica(path, body)

    def _by_process(self, order: Order, *, killed: bool) -> None:
        """Run an order in a process of its own, and kill it at some step."""
        told, tells = _SPAWNER.Pipe(duplex=False)
        process = _SPAWNER.Process(target=run_aloud, args=(self._settings, order, tells))
        process.start()
        tells.close()
        steps, words = self._random.randint(1, 5) if killed else 1_000, "start"
        try:
            for _ in range(steps):
                words = told.recv()
                if words.startswith("refused"):
                    self._field.tally.count(self._field.tally.allowed, f"switch: {words}")
            time.sleep(self._random.uniform(0, 0.02))
            process.kill()
            done = f"kill -9 of a command ({order.kind}, {words})"
            self._field.tally.count(self._field.tally.injected, done)
        except EOFError:  # it ended by itself
            pass
        process.join()
        process.close()

    def _by_replica(self, path: str, body: Mapping[str, Any]) -> None:
        """Order a switch over HTTP, and wait for its operation, whoever may finish it."""
        tally, replica = self._field.tally, self._random.choice(self._field.told)
        try:
            response = self._http.post(f"{replica.url}{path}", json=body)
        except httpx2.TransportError:
            tally.count(tally.allowed, "switch: no connection")
            return
        if response.status_code != 202:
            tally.count(tally.allowed, f"switch: {response.status_code} {_code(response)}")
            return
        if self._random.random() < 0.3:
            self._kill(replica)
        deadline = time.monotonic() + _FINISHED_S
        while not self._is_finished(response.json()["id"]):
            if time.monotonic() > deadline:
                tally.accuse([Finding(Fault.LOST, f"operation {response.text} never ends")])
                return
            time.sleep(0.1)

    def _is_finished(self, operation: str) -> bool:
        replica = self._random.choice(self._field.told)
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

    def _wait_until_followed(self, live: Deployed) -> None:
        while not self._field.stopping.is_set():
            if all(watcher.followed >= live.generation for watcher in self._watchers):
                return
            time.sleep(0.01)


class Watcher:
    """Sees when one replica takes up what went live, and notes how long it took.

    Attributes:
        followed: the last generation that it served, or that it need not be waited for.
    """

    def __init__(self, field: Field, replica: Replica) -> None:
        self._field, self._replica = field, replica
        self._starved: dict[str, float] = {}
        self.followed = 0

    def run(self) -> None:
        """Watch until the soak stops."""
        waiting, self.followed = None, self._field.world.live.generation
        while not self._field.stopping.wait(_LOOKED_S):
            live = self._field.world.live
            if waiting and waiting.generation < live.generation:
                self._note_late(waiting)
                waiting = None
            if waiting is None and live.generation > self.followed:
                waiting, self._starved = live, self._replica.starved()
            if waiting and self._follows(waiting):
                self.followed, waiting = waiting.generation, None

    def _follows(self, live: Deployed) -> bool:
        served = self._replica.serves()
        seconds = time.monotonic() - live.seen_at
        if self._was_disturbed(live):
            return True
        if served is not None and served.startswith(f"{live.snapshot}."):
            self._note(live, seconds)
            return True
        if seconds < _FOLLOWED_S:
            return False
        text = f"{self._replica.name} never served {live.snapshot}"
        self._field.tally.accuse([Finding(Fault.LOST, text)])
        return True

    def _note_late(self, live: Deployed) -> None:
        """Note a replica that had not followed a switch when the next one came."""
        seconds = time.monotonic() - live.seen_at
        if seconds > CONVERGED_S and not self._was_disturbed(live):
            self._note(live, seconds)

    def _note(self, live: Deployed, seconds: float) -> None:
        """Note how long it took; too long is a fault, unless for want of a core."""
        self._field.tally.followed(seconds)
        now = self._replica.starved()
        starved = max((t - self._starved.get(name, 0.0) for name, t in now.items()), default=0.0)
        if seconds - starved > CONVERGED_S:
            text = (
                f"{self._replica.name} followed {live.snapshot} after {seconds:.1f} s, "
                f"{starved:.1f} s of them without a core"
            )
            self._field.tally.accuse([Finding(Fault.LATE, text)])

    def _was_disturbed(self, live: Deployed) -> bool:
        parts = (DATABASE, STORE, CONTENT, self._replica.name)
        return self._field.absences.overlap(parts, live.seen_at, time.monotonic())


def _code(response: httpx2.Response) -> str:
    return str(response.json()["type"]).rpartition(":")[2]


class Changer:
    """Puts and erases ids, and demands that what was acknowledged is there."""

    def __init__(self, field: Field, seed: int, pause_s: float) -> None:
        self._field, self._random, self._pause_s = field, random.Random(seed), pause_s
        self._http = httpx2.Client(headers=field.headers, timeout=20)
        self._made = 0

    def run(self) -> None:
        """Change ids until the soak stops."""
        with self._http:
            while not self._field.stopping.wait(self._random.uniform(0, 2 * self._pause_s)):
                if self._random.random() < 0.75:
                    self._put()
                else:
                    self._erase()

    def _put(self) -> None:
        world, entity = self._field.world, self._random.choice(list(Entity))
        known = [id for id in world.population if id[0] is entity]
        ids = dict.fromkeys(self._random.sample(known, self._random.randint(0, 6)))
        if not ids or self._random.random() < 0.3:
            self._made += 1
            world.population.append((entity, f"new {self._made}"))
            ids[world.population[-1]] = None
        if not (world.erased & ids.keys()):
            self._send_put(entity, list(ids))
        elif world.publishing.acquire(timeout=5):
            try:
                self._send_put(entity, list(ids))
            finally:
                world.publishing.release()

    def _send_put(self, entity: Entity, ids: list[Id]) -> None:
        world = self._field.world
        version = world.live.version
        vectors = world.draw(version, ids)
        world.ledger.will_upsert(vectors)
        names = [id for _, id in ids]
        body = {
            "ids": names,
            "vectors": [row.tolist() for row in vectors.values()],
            "entity": entity,
            "expected_live": version,
        }
        document = self._send("PUT", body, "upsert")
        if document is None:
            return
        world.look()
        snapshot, delta = split(document["snapshot"])
        rows = world.ledger.rows(snapshot, delta, entity, names)
        lost = [
            id
            for id, row in zip(ids, rows, strict=True)
            if row is None or not np.array_equal(row, vectors[id])
        ]
        if lost:
            text = f"{document['snapshot']} was acknowledged without {lost}"
            self._field.tally.accuse([Finding(Fault.LOST, text)])

    def _erase(self) -> None:
        world = self._field.world
        ids = self._random.sample(world.population, self._random.randint(1, 2))
        ids = [id for id in ids if id[0] is ids[0][0]]
        world.ledger.will_erase(ids)
        body = {"ids": [id for _, id in ids], "entity": ids[0][0]}
        if self._send("DELETE", body, "erasure") is None:
            return
        world.look()
        held = [name for name in world.ledger.snapshots() if self._holds(name, ids)]
        if held or not world.erased.issuperset(ids):
            text = f"the erasure of {ids} was acknowledged, and they are in {held}"
            self._field.tally.accuse([Finding(Fault.LOST, text)])

    def _holds(self, snapshot: str, ids: list[Id]) -> bool:
        world = self._field.world
        if snapshot in world.condemned:
            return False
        entity, head = ids[0][0], world.ledger.head(snapshot)
        rows = world.ledger.rows(snapshot, head, entity, [id for _, id in ids])
        return any(row is not None for row in rows)

    def _send(self, method: str, body: Mapping[str, Any], what: str) -> dict[str, Any] | None:
        """Send a change to some replica; return the acknowledgement, if one comes."""
        tally, replica = self._field.tally, self._random.choice(self._field.told)
        try:
            response = self._http.request(method, f"{replica.url}/admin/embeddings", json=body)
        except httpx2.TransportError:
            tally.count(tally.allowed, f"{what}: no connection")
            return None
        if response.status_code != 200:
            tally.count(tally.allowed, f"{what}: {response.status_code} {_code(response)}")
            return None
        tally.count(tally.changes, f"acknowledged {what}")
        document: dict[str, Any] = response.json()
        return document


class Breaker:
    """Kills and stalls replicas, stops servers, empties the store, one at a time."""

    def __init__(
        self, field: Field, outages: Mapping[str, Outage], seed: int, pause_s: float
    ) -> None:
        self._field, self._outages = field, outages
        self._random, self._pause_s = random.Random(seed), pause_s
        self._wanted: SimpleQueue[Replica] = SimpleQueue()

    def run(self) -> None:
        """Break something until the soak stops; every kind comes once in a while.

        Nothing is broken before the replicas have followed a first switch, so that there is one.
        """
        while not self._field.tally.converged:
            if self._field.stopping.wait(_LOOKED_S):
                return
        kinds: list[Callable[[], None]] = []
        while not self._field.stopping.is_set():
            if not kinds:
                kinds = [self._kill_any, self._stall, self._kill_any, self._empty]
                kinds += [partial(self._stop, part) for part in self._outages]
                self._random.shuffle(kinds)
            try:
                self._kill(self._wanted.get(timeout=self._random.uniform(0, 2 * self._pause_s)))
            except Empty:
                kinds.pop()()

    def kill(self, replica: Replica) -> None:
        """Have a replica killed as soon as nothing else is broken."""
        self._wanted.put(replica)

    def _kill_any(self) -> None:
        self._kill(self._random.choice(self._field.replicas))

    def _kill(self, replica: Replica) -> None:
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

    def _empty(self) -> None:
        """Empty the store, and fill it again as an operator would."""
        world, tally = self._field.world, self._field.tally
        tally.count(tally.injected, "flush of the store")
        with self._field.absences.of(CONTENT):
            world.note_emptied()
            with Redis.from_url(world.settings.store_url) as server:
                server.flushdb()
            time.sleep(self._random.uniform(0.3, 2))
            if not self._fill():
                text = "the store was emptied, and no promotion fills it again"
                tally.accuse([Finding(Fault.LOST, text)])
            world.note_emptied()

    def _fill(self) -> bool:
        """Promote what is live until every replica serves; return whether all do in time."""
        deadline = time.monotonic() + _FILLED_S
        while not all(replica.serves() for replica in self._field.replicas):
            if time.monotonic() > deadline:
                return False
            self._promote_live()
        return True

    def _promote_live(self) -> None:
        """Fill the store with what is live; refused where another switch is on, or comes first."""
        version = str(self._field.world.live.version)
        subprocess.run(
            [sys.executable, "-m", "backcast", "promote", version, "--expected-live", version],
            env=replica_environment(self._field.world.settings),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
