"""Which code can run on which schema: the name of each revision says it.

``0004_for_0003`` is the fourth revision, and code that was written for the third can still run on
it: the migration only added. A name without ``_for_`` leaves the code before it behind. So a
replica of an older release can tell, from the one name that the database holds, whether it may
start, though it knows nothing of the migration.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

_NAME = re.compile(r"(\d{4})(?:_for_(\d{4}))?")


class Fit(StrEnum):
    """What the schema that was found is to the code that found it."""

    CURRENT = "current"
    EXPANDED = "expanded"
    OLDER = "older"
    NEWER = "newer"
    ABSENT = "absent"

    @property
    def runs(self) -> bool:
        """Whether the code may run on it."""
        return self in {Fit.CURRENT, Fit.EXPANDED}


@dataclass(frozen=True)
class Revision:
    """One revision of the schema.

    Attributes:
        number: of the migration that led to it, from 1.
        oldest: the number of the oldest revision whose code can run on it.
    """

    number: int
    oldest: int

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a revision's name; raise ValueError for one that breaks the rule above."""
        found = _NAME.fullmatch(name)
        if found is None or int(found[2] or found[1]) > int(found[1]):
            raise ValueError(f"revision {name!r}; expected a name such as 0004_for_0003")
        return cls(int(found[1]), int(found[2] or found[1]))

    def ends_code_of(self, other: "Revision") -> bool:
        """Return whether code that can run on ``other`` cannot run on this."""
        return self.oldest > other.oldest


def fit(found: str | None, own: str) -> Fit:
    """Return what the revision ``found`` in a database is to code that was written for ``own``."""
    if found is None:
        return Fit.ABSENT
    if found == own:
        return Fit.CURRENT
    try:
        there, here = Revision.parse(found), Revision.parse(own)
    except ValueError:
        return Fit.NEWER  # a name that this release's rule does not know
    if there.number < here.number:
        return Fit.OLDER
    expanded = there.number > here.number and there.oldest <= here.number
    return Fit.EXPANDED if expanded else Fit.NEWER
