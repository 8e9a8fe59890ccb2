"""Whoever acts by a command, and the audit log of it."""

import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from backcast.acts import Act, Actor
from backcast.registry import Registry
from backcast.registry.audit import Recorded

Reason = Annotated[str | None, typer.Option(help="Why; kept in the audit log.")]

_LONGEST = 128


def actor() -> str:
    """Return who runs this command, and where: the process's user, whatever its variables say."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, as a rule
        user = str(os.getuid())
    return f"cli:{user}@{socket.gethostname()}"[:_LONGEST]


@contextmanager
def acting(registry: Registry, act: Act) -> Iterator[Recorded]:
    """Record an act in the audit log before the block, and after it what became of it."""
    with registry.audit.recording(Actor(actor()), act) as recorded:
        yield recorded
