"""How many requests of one kind are let in at once, from their keys to their answers' ends."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from anyio import CapacityLimiter

from backcast.errors import Overloaded

PLACE = "backcast.place"
"""In the scope of a request that is to take a place, once it is known whose it is."""


class Gate:
    """Lets some in to work, and some more to wait for those; refuses all others at once.

    A place is taken for a consumer, so that whoever has no key in force takes none.

    Args:
        kind: what they are, in words.
        shed: where those that are refused are counted.
        at_once, waiting: how many may work, and how many wait.
        share: of all places that one consumer may have, lest one that is slow keep out all others.

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
        share: float = 1.0,
        seconds: float = math.inf,
    ) -> None:
        self.at_work, self.inside, self.seconds = CapacityLimiter(at_once), 0, seconds
        self._kind, self._shed, self._most = kind, shed, at_once + waiting
        self._most_each = max(1, int(self._most * share))
        self._places: Counter[str] = Counter()

    @contextmanager
    def opened(self) -> Iterator["Place"]:
        """Yield a place that may be taken, until the block ends."""
        place = Place(self)
        place.ends = self.seconds < math.inf
        try:
            yield place
        finally:
            place.ends = False
            if place.consumer is not None:
                self.inside -= 1
                self._places[place.consumer] -= 1

    def give(self, place: "Place", consumer: str) -> None:
        """Let a consumer in; raise Overloaded where too many are, or too many of the consumer's."""
        own, most = self._places[consumer], self._most_each
        self._demand(self.inside < self._most, f"{self._most} {self._kind}")
        self._demand(own < most, f"{most} {self._kind} of {consumer}")
        self.inside += 1
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
    """One request's place within a gate: nobody's at first.

    Attributes:
        consumer: whose it is.
        ends: whether the gate ends the request, should it take too long.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.consumer: str | None = None
        self.ends = False

    def take(self, consumer: str) -> None:
        """Be inside until the answer's end; raise Overloaded where there is no room."""
        self._gate.give(self, consumer)
