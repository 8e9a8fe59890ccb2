"""What may be asked for as an operation: each order can be written down, and run again.

Running one twice is harmless: what is loaded stays loaded, and what is live is compared and
swapped once. So a replica carries on what another began by running the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from backcast.errors import InvalidInput, PromotionConflict
from backcast.lifecycle.places import Backcast, Report
from backcast.lifecycle.promotion import Expected, demand_expected, find_candidate, promote
from backcast.lifecycle.refreshing import compact, demand_changes, is_compacted, refresh
from backcast.lifecycle.rollback import find_target, rollback
from backcast.versions import Claim, Live


class Order(Protocol):
    """One change of what is live, as somebody asked for it."""

    kind: ClassVar[str]

    def document(self) -> dict[str, Any]:
        """Return the order as JSON; ``read_order`` reads it back."""

    def check(self, backcast: Backcast) -> None:
        """Raise at once what needs no work to be refused."""

    def run(self, backcast: Backcast, actor: str, claim: Claim, report: Report) -> Live:
        """Do it and return what is live then."""


@dataclass(frozen=True)
class Promote:
    """Make a version live; see ``promote``."""

    kind: ClassVar[str] = "promote"

    version: int
    expected_live: int | Expected | None = None
    force: bool = False
    reason: str | None = None
    snapshot: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the order; ``expected_live`` is null for nothing, and absent where any may be."""
        order = {"version": self.version, "force": self.force, "reason": self.reason}
        named = {} if self.snapshot is None else {"snapshot": self.snapshot}
        return order | named | _expectation(self.expected_live)

    def check(self, backcast: Backcast) -> None:
        """Raise what ``find_candidate`` raises; a forced promotion needs a reason."""
        if self.force and not self.reason:
            raise InvalidInput("A forced promotion needs a reason.")
        find_candidate(
            backcast, self.version, expected_live=self.expected_live, snapshot=self.snapshot
        )

    def run(self, backcast: Backcast, actor: str, claim: Claim, report: Report) -> Live:
        """Promote."""
        return promote(
            backcast,
            self.version,
            actor=actor,
            expected_live=self.expected_live,
            force=self.force,
            reason=self.reason,
            snapshot=self.snapshot,
            operation=claim,
            report=report,
        ).live


@dataclass(frozen=True)
class Refresh:
    """Make the newest snapshot of the live version live; see ``refresh`` and ``compact``.

    ``compacted``: first write what is live, with its changes, as that snapshot.
    """

    kind: ClassVar[str] = "refresh"

    version: int
    expected_live: int | Expected | None = None
    compacted: bool = False
    reason: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the order."""
        order = {"version": self.version, "compact": self.compacted, "reason": self.reason}
        return order | _expectation(self.expected_live)

    def check(self, backcast: Backcast) -> None:
        """Raise PromotionConflict where the version is not live, Conflict where nothing is new."""
        backcast.registry.versions.get(self.version)
        live = backcast.registry.deployments.live()
        demand_expected(self.expected_live, live)
        if live is None or live.version != self.version:
            raise PromotionConflict(
                f"Version {self.version} is not live, so it cannot be refreshed; promote it.",
                current_version=None if live is None else live.version,
            )
        if self.compacted:
            demand_changes(live)
        else:
            find_candidate(backcast, self.version)

    def run(self, backcast: Backcast, actor: str, claim: Claim, report: Report) -> Live:
        """Compact where that was asked for and is not done yet, then refresh."""
        written = 0.4 if self.compacted else 0.0
        if self.compacted and not is_compacted(backcast):
            compact(
                backcast,
                expected_live=self.version,
                report=lambda step, done: report(step, round(written * done, 2)),
            )
        return refresh(
            backcast,
            actor=actor,
            expected_live=self.version,
            reason=self.reason,
            operation=claim,
            report=lambda step, done: report(step, round(written + (1 - written) * done, 2)),
        ).live


@dataclass(frozen=True)
class Rollback:
    """Go back to what was live before; see ``rollback``."""

    kind: ClassVar[str] = "rollback"

    expected_live: int | None
    reason: str
    to_snapshot: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the order."""
        order = {"reason": self.reason, "to_snapshot": self.to_snapshot}
        return order | _expectation(self.expected_live)

    def check(self, backcast: Backcast) -> None:
        """Raise what ``find_target`` raises."""
        find_target(backcast, expected_live=self.expected_live, to_snapshot=self.to_snapshot)

    def run(self, backcast: Backcast, actor: str, claim: Claim, report: Report) -> Live:
        """Go back."""
        return rollback(
            backcast,
            actor=actor,
            expected_live=self.expected_live,
            reason=self.reason,
            to_snapshot=self.to_snapshot,
            operation=claim,
            report=report,
        )


def read_order(kind: str, document: Mapping[str, Any]) -> Order:
    """Return the order of an operation, as ``document`` of its class wrote it."""
    fields = dict(document)
    if "expected_live" in fields and fields["expected_live"] is None:
        fields["expected_live"] = Expected.NOTHING
    if kind == Rollback.kind:
        return Rollback(**{"expected_live": None, **fields})
    if kind == Refresh.kind:
        return Refresh(compacted=fields.pop("compact"), **fields)
    return Promote(**fields)


def _expectation(expected: int | Expected | None) -> dict[str, Any]:
    if expected is None:
        return {}
    return {"expected_live": None if expected is Expected.NOTHING else expected}
