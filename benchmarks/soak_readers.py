"""Readers who compare every vector that they get with what it must be."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Self
from urllib.parse import quote

import httpx2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from backcast.versions import Entity
from benchmarks.soak_checker import (
    Answer,
    Fault,
    Finding,
    Question,
    UnknownState,
    judge,
    judge_problem,
    split,
)
from benchmarks.soak_replicas import Replica
from benchmarks.soak_tally import Absences, Tally
from benchmarks.soak_world import World

JSON, ARROW, RAW = (
    "application/json",
    "application/vnd.apache.arrow.stream",
    "application/octet-stream",
)
DATABASE, STORE, CONTENT = "database", "store", "content of the store"
_LARGEST = 150
_PAUSE_S = 0.01  # what the readers leave of the machine is the replicas'
_LEDGER_S = 30.0  # until a state that an answer names must be in the registry
_ANSWER_S = 20.0

ABSENT: dict[str, tuple[str, ...]] = {
    "registry-error": (DATABASE,),
    "store-error": (STORE,),
    "snapshot-not-loaded": (CONTENT,),
    "not-ready": (DATABASE, STORE, CONTENT),
}
"""Which part must be away, or the replica itself, for a 503 of each kind."""


@dataclass(frozen=True)
class Field:
    """What all who act on the replicas share."""

    world: World
    replicas: Sequence[Replica]
    tally: Tally
    absences: Absences
    headers: dict[str, str]
    stopping: Event

    @property
    def told(self) -> Sequence[Replica]:
        """Those that changes, orders and demands go to, from which they learn what is live.

        The last one is told nothing: it must look for itself.
        """
        return self.replicas[:-1] or self.replicas


class Reader:
    """Asks for vectors at random until told to stop."""

    def __init__(self, field: Field, seed: int) -> None:
        self._field, self._random = field, random.Random(seed)
        self._http = httpx2.Client(headers=field.headers, timeout=_ANSWER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def run(self) -> None:
        """Read until the soak stops."""
        with self:
            while not self._field.stopping.wait(self._random.uniform(0, 2 * _PAUSE_S)):
                if self._random.random() < 0.15:
                    self._session()
                else:
                    self.ask(self._question(), self._format(), self._replica())

    def _session(self) -> None:
        """Read many batches that must all be of the snapshot that the first one named."""
        answer = self.ask(self._question(several=True), self._format(), self._replica())
        if answer is None:
            return
        name = self._random.choice([answer.snapshot, split(answer.snapshot)[0]])
        for _ in range(self._random.randint(3, 8)):
            asked = replace(self._question(several=True), expected=name)
            replica = self._random.choice(self._field.told)
            if self.ask(asked, self._format(), replica) is None:
                return

    def _question(self, *, several: bool = False) -> Question:
        pick, world = self._random, self._field.world
        models = world.ledger.models
        entity = pick.choice(list(Entity))
        known = [id for kind, id in world.population if kind is entity]
        if several or pick.random() < 0.5:
            ids = pick.choices([*known, "nobody"], k=pick.randint(1, _LARGEST))
        else:
            ids = ["nobody"] if pick.random() < 0.02 else [pick.choice(known)]
        chain = models.chain(world.live.version)
        version = pick.choice(chain if pick.random() < 0.85 else list(models.dims))
        return Question(entity, ids, version)

    def _format(self) -> str:
        return self._random.choice((JSON, ARROW, RAW))

    def _replica(self) -> Replica:
        return self._random.choice(self._field.replicas)

    def ask(self, asked: Question, format: str, replica: Replica) -> Answer | None:
        """Ask one replica and count the verdict; return an answer with vectors."""
        started = time.monotonic()
        try:
            response = self._send(asked, format, replica)
        except httpx2.TransportError as error:
            self._unanswered(replica, started, f"{type(error).__name__}: {error}")
            return None
        if response.status_code == 200:
            answer = read_answer(response, format)
            self._note(format, len(asked.ids), lambda ledger: judge(ledger, asked, answer))
            return answer
        self._refused(asked, response.json(), replica, started)
        return None

    def _send(self, asked: Question, format: str, replica: Replica) -> httpx2.Response:
        headers = {"Accept": format}
        if asked.expected is not None:
            headers["Backcast-Expect-Snapshot"] = asked.expected
        if len(asked.ids) == 1:
            path = f"{replica.url}/embeddings/{quote(asked.ids[0], safe='')}"
            query: dict[str, str | int] = {
                "version": asked.version,
                "entity": str(asked.entity),
            }
            return self._http.get(path, params=query, headers=headers)
        body = {"ids": list(asked.ids), "version": asked.version, "entity": asked.entity}
        return self._http.post(f"{replica.url}/embeddings/batch", json=body, headers=headers)

    def _note(
        self, kind: str, vectors: int, verdict: Callable[[Any], Sequence[Finding] | None]
    ) -> None:
        """Judge as soon as the ledger knows the state that is named."""
        deadline = time.monotonic() + _LEDGER_S
        while True:
            try:
                findings = verdict(self._field.world.ledger)
                break
            except UnknownState as error:
                if time.monotonic() > deadline:
                    findings = [Finding(Fault.LOST, f"{error} is never heard of")]
                    break
                time.sleep(0.01)
        self._field.tally.accuse(findings or ())
        self._field.tally.verified(kind, vectors)

    def _unanswered(self, replica: Replica, started: float, words: str) -> None:
        if self._field.absences.overlap([replica.name], started, time.monotonic()):
            self._field.tally.count(self._field.tally.allowed, "no connection: replica away")
            time.sleep(0.02)
        else:
            self._field.tally.accuse([Finding(Fault.LOST, f"{replica.name} answers {words}")])

    def _refused(
        self, asked: Question, problem: dict[str, Any], replica: Replica, started: float
    ) -> None:
        status, code = problem["status"], str(problem["type"]).rpartition(":")[2]
        tally = self._field.tally
        if status == 503:
            parts = (*ABSENT.get(code, ()), replica.name)
            gone = code == "snapshot-not-loaded" and self._field.world.may_be_gone(
                asked.expected or ""
            )
            if gone or self._field.absences.overlap(parts, started, time.monotonic()):
                tally.count(tally.allowed, f"503 {code}")
                time.sleep(0.02)
            else:
                text = f"{replica.name} answers 503 while nothing is away: {problem['detail']}"
                tally.accuse([Finding(Fault.LOST, text)])
        elif status == 412:
            self._note("412", 0, lambda _: self._judge_mismatch(asked, problem))
            tally.count(tally.allowed, "412 snapshot-mismatch")
        else:
            self._note(code, 0, lambda ledger: judge_problem(ledger, asked, problem) or [])
            tally.count(tally.allowed, f"{status} {code}")
            if code not in {"unknown-id", "version-off-chain", "version-not-promoted"}:
                tally.accuse([Finding(Fault.WRONG, f"{status} {code}: {problem['detail']}")])

    def _judge_mismatch(self, asked: Question, problem: dict[str, Any]) -> list[Finding]:
        """A demand is refused only where ids were changed since, or the snapshot is gone."""
        world = self._field.world
        try:
            world.follow()
        except SQLAlchemyError as error:
            raise UnknownState(str(asked.expected)) from error
        assert asked.expected is not None
        snapshot, _, delta = asked.expected.partition(".")
        head = world.ledger.head(snapshot)
        gone = snapshot in world.condemned or world.may_be_gone(snapshot)
        if gone or (delta and int(delta) < head):
            return []
        return [Finding(Fault.WRONG, f"{problem['detail']} It is at {snapshot}.{head}.")]


def read_answer(response: httpx2.Response, format: str) -> Answer:
    """Read vectors in the format that was asked for; one vector is a batch of one."""
    dim = int(response.headers["Backcast-Dim"])
    return Answer(
        response.headers["Backcast-Snapshot"],
        int(response.headers["Backcast-Version"]),
        int(response.headers["Backcast-Live-Version"]),
        _READ[format](response, dim),
    )


def _read_raw(response: httpx2.Response, dim: int) -> NDArray[np.float32]:
    return np.frombuffer(response.content, "<f4").reshape(-1, dim)


def _read_arrow(response: httpx2.Response, dim: int) -> NDArray[np.float32]:
    with pa.ipc.open_stream(response.content) as stream:
        return _rows(stream.read_all()["vector"].to_pylist(), dim)


def _read_json(response: httpx2.Response, dim: int) -> NDArray[np.float32]:
    document = response.json()
    return _rows([row["embedding"] for row in document.get("embeddings", [document])], dim)


def _rows(rows: Sequence[list[float] | None], dim: int) -> NDArray[np.float32]:
    return np.array([row or [np.nan] * dim for row in rows], np.float32).reshape(len(rows), dim)


_READ = {JSON: _read_json, ARROW: _read_arrow, RAW: _read_raw}
