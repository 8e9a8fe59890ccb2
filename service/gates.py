"""How many requests of one kind are let in at once, from their heads to their answers' ends."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from anyio import CapacityLimiter

from backcast.errors import Overloaded

PLACE = "backcast.place"
"""In the scope of a request that has passed a gate."""


class Gate:
    """Lets some in to work, and some more to wait for those; refuses all others at once.

    No consumer has more than half of the places, lest one that is slow keep out everybody else.

    Attributes:
        at_work: limits those that work.
        inside: how many are in now: working, waiting, or being answered.
        seconds: how long each may stay.
    """

    def __init__(
        self,
        kind: str,
        shed: Counter[str],
        *,
        at_once: int,
        waiting: int,
        seconds: float = math.inf,
    ) -> None:
        self.at_work, self.inside, self.seconds = CapacityLimiter(at_once), 0, seconds
        self._kind, self._shed, self._most = kind, shed, at_once + waiting
        self._places: Counter[str] = Counter()

    @contextmanager
    def entered(self) -> Iterator["Place"]:
        """Be inside during the block; raise Overloaded where too many are."""
        self._demand(self.inside < self._most, f"{self._most} {self._kind}")
        self.inside += 1
        place = Place(self)
        try:
            yield place
        finally:
            self.inside -= 1
            if place.consumer is not None:
                self._places[place.consumer] -= 1

    def give(self, place: "Place", consumer: str) -> None:
        """Note whose a place is; raise Overloaded where half of all are the consumer's already."""
        most = max(1, self._most // 2)
        self._demand(self._places[consumer] < most, f"{most} {self._kind} of {consumer}")
        self._places[consumer] += 1
        place.consumer = consumer

    def too_slow(self) -> Overloaded:
        """Return the error of one that stayed too long."""
        self._shed[f"slow {self._kind}"] += 1
        return Overloaded(
            f"This was not answered within {self.seconds:g} s, for there was too much to do; "
            "try again."
        )

    def _demand(self, room: bool, what: str) -> None:
        if not room:
            self._shed[self._kind] += 1
            raise Overloaded(f"This replica has {what} to answer already; try again.")


class Place:
    """One request's place within a gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.consumer: str | None = None

    def belong_to(self, consumer: str) -> None:
        """Note whose it is; raise Overloaded where the consumer has too many."""
        self._gate.give(self, consumer)
