"""What is noted in a request's scope while it is answered, for whoever counts it."""

from dataclasses import dataclass

from service.wire import Format

PROBLEM = "backcast.problem"
"""The code of the problem document that answers it."""

SERVED = "backcast.served"
"""What the answer is made of, where it holds vectors."""


@dataclass(slots=True)
class Served:
    """What an answer with vectors is made of, and the seconds that its parts took.

    ``vectors`` and ``gathering`` are 0 where the client's copy was current, ``mapping`` is where
    vectors are served as they are stored; ``encoding`` grows while a long answer is written.
    """

    version: int
    format: Format
    vectors: int = 0
    gathering: float = 0.0
    mapping: float = 0.0
    encoding: float = 0.0
