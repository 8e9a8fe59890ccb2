"""The verdict on every answer: right, or torn, wrong or lost, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backcast.versions import Entity
from benchmarks.soak_ledger import Ledger, Row, UnknownState

TOLERANCE = 1e-5


class Fault(StrEnum):
    """What must never happen.

    TORN: right for another state than the one that the answer names.
    WRONG: right for none, or an error that the state does not give.
    LOST: an acknowledged change is not there, or there is no verdict at all.
    LATE: a replica that nothing disturbed did not follow a switch in time.
    """

    TORN = "torn"
    WRONG = "wrong"
    LOST = "lost"
    LATE = "late"


@dataclass(frozen=True)
class Finding:
    """One fault, in words."""

    fault: Fault
    text: str


@dataclass(frozen=True)
class Question:
    """What was asked for; ``expected`` is the snapshot demanded, if one was."""

    entity: Entity
    ids: Sequence[str]
    version: int
    expected: str | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What came back.

    Attributes:
        snapshot: S.d.
        vectors: (n, D_j) float32; rows that are missing are NaN.
    """

    snapshot: str
    version: int
    live_version: int
    vectors: NDArray[np.float32]

    @property
    def found(self) -> NDArray[np.bool_]:
        """(n,) bool."""
        found: NDArray[np.bool_] = ~np.all(np.isnan(self.vectors), axis=1)
        return found


def split(name: str) -> tuple[str, int]:
    """Return S and d of S.d."""
    snapshot, _, delta = name.rpartition(".")
    return snapshot, int(delta)


def judge(ledger: Ledger, asked: Question, answer: Answer) -> list[Finding]:
    """Compare an answer with the state that it names; no finding means that it is right.

    Raises:
        UnknownState: the ledger has not heard of that state yet.
    """
    snapshot, delta = split(answer.snapshot)
    rows = ledger.rows(snapshot, delta, asked.entity, asked.ids)
    live = ledger.version_of(snapshot)
    if answer.live_version != live:
        return [_torn(answer, f"names live version {answer.live_version}, it is {live}")]
    if asked.expected not in (None, answer.snapshot, snapshot):
        return [_torn(answer, f"where {asked.expected} was demanded")]
    if asked.version not in ledger.models.chain(live):
        return [_wrong(answer, f"serves version {asked.version}, which is off the chain")]
    shape = (len(asked.ids), ledger.models.dims[asked.version])
    if answer.version != asked.version or answer.vectors.shape != shape:
        return [
            _wrong(
                answer,
                f"is version {answer.version} of shape {answer.vectors.shape}, "
                f"not {asked.version} of {shape}",
            )
        ]
    return [*_presence(asked, answer, rows), *_values(ledger, asked, answer, rows)]


def _torn(answer: Answer, text: str) -> Finding:
    return Finding(Fault.TORN, f"{answer.snapshot} {text}")


def _wrong(answer: Answer, text: str) -> Finding:
    return Finding(Fault.WRONG, f"{answer.snapshot} {text}")


def _presence(asked: Question, answer: Answer, rows: Sequence[Row | None]) -> list[Finding]:
    return [
        Finding(
            Fault.LOST,
            f"{answer.snapshot} {'answers for' if found else 'lacks'} {asked.entity} {id!r}",
        )
        for id, row, found in zip(asked.ids, rows, answer.found, strict=True)
        if (row is not None) != found
    ]


def _values(
    ledger: Ledger, asked: Question, answer: Answer, rows: Sequence[Row | None]
) -> list[Finding]:
    both = [at for at, row in enumerate(rows) if row is not None and answer.found[at]]
    if not both:
        return []
    stored = np.stack([row for at in both if (row := rows[at]) is not None])
    served = answer.vectors[both]
    right = _is_right(ledger, asked.version, answer.live_version, stored, served)
    return [
        _explain(ledger, asked, answer, asked.ids[both[at]], served[at])
        for at in np.flatnonzero(~right)
    ]


def _is_right(
    ledger: Ledger,
    target: int,
    live: int,
    stored: NDArray[np.float32],
    served: NDArray[np.float32],
) -> NDArray[np.bool_]:
    z = stored.astype(np.float64)
    error = np.linalg.norm(served - ledger.models.reference(target, live, z), axis=1)
    gain, offset = ledger.models.bound(target, live)
    right: NDArray[np.bool_] = error <= TOLERANCE * (gain * np.linalg.norm(z, axis=1) + offset)
    return right


def _explain(ledger: Ledger, asked: Question, answer: Answer, id: str, row: Row) -> Finding:
    """Find the state that a vector does belong to, if there is one."""
    snapshot, delta = split(answer.snapshot)
    what = f"{asked.entity} {id!r} as version {asked.version}"
    for other, number, stored in ledger.others(asked.entity, id):
        live = ledger.version_of(other)
        if asked.version not in ledger.models.chain(live):
            continue
        if _is_right(ledger, asked.version, live, stored[None], row[None])[0]:
            older = other == snapshot and number < delta
            return Finding(
                Fault.LOST if older else Fault.TORN,
                f"{answer.snapshot} gives {what} the vector of {other}.{number}",
            )
    return _wrong(answer, f"gives {what} a vector that it never had")


def judge_problem(
    ledger: Ledger, asked: Question, problem: Mapping[str, Any]
) -> list[Finding] | None:
    """Compare an error with the state that it names; None where no state gives such an error.

    Raises:
        UnknownState: the ledger has not heard of that state yet.
    """
    code = str(problem["type"]).rpartition(":")[2]
    if code == "unknown-id":
        snapshot, delta = split(problem["snapshot"])
        (row,) = ledger.rows(snapshot, delta, asked.entity, asked.ids)
        if row is None:
            return []
        lost = f"{snapshot}.{delta} lacks {asked.entity} {asked.ids[0]!r}"
        return [Finding(Fault.LOST, lost)]
    if code in {"version-off-chain", "version-not-promoted"}:
        return _judge_refusal(ledger, asked, problem)
    return None


def _judge_refusal(ledger: Ledger, asked: Question, problem: Mapping[str, Any]) -> list[Finding]:
    live = problem["current_version"]
    chain = sorted(ledger.models.chain(live))
    if asked.version in chain or list(problem["servable_versions"]) != chain:
        return [
            Finding(
                Fault.WRONG,
                f"version {asked.version} is refused while {live} is live, "
                f"with {problem['servable_versions']} servable, not {chain}",
            )
        ]
    return []


__all__ = [
    "Answer",
    "Fault",
    "Finding",
    "Question",
    "UnknownState",
    "judge",
    "judge_problem",
    "split",
]
