"""Consumers and their API keys. A secret is shown once and stored as a hash."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from backcast.errors import Conflict, InvalidInput, LastAdminKey, UnknownKey
from backcast.registry import tables
from backcast.registry.consumers import ANONYMOUS, demand_pinnable
from backcast.registry.database import Database, clock, utc_now
from backcast.versions import Key, KeyState, Scope

_PREFIX_BYTES, _SECRET_BYTES = 4, 32
_PREFIXES = 500  # asked for in one statement
_LAST = datetime.max.replace(tzinfo=UTC)

PREFIX = r"[0-9a-f]{8}"
"""What a key's prefix looks like."""

# No longer than one that is made: nobody lets this hash what he likes.
_SECRET = re.compile(rf"bc_({PREFIX})_[A-Za-z0-9_-]{{1,43}}")


def split_secret(secret: str) -> str | None:
    """Return the public prefix of a well-formed secret, else None."""
    found = _SECRET.fullmatch(secret)
    return None if found is None else found[1]


def prefix_of(key: str) -> str:
    """Return the prefix of a key that was named by it or by its secret.

    Raises:
        InvalidInput: it is neither; what was given may be secret, and is not repeated.
    """
    prefix = split_secret(key) or key
    if re.fullmatch(PREFIX, prefix) is None:
        raise InvalidInput(
            "A key is named by its prefix: eight hexadecimal digits, as `backcast keys list` shows "
            "them."
        )
    return prefix


def matches(key: Key, secret: str) -> bool:
    """Compare in constant time. The secret has 256 random bits, so a plain hash is enough."""
    return hmac.compare_digest(_hash(secret), key.sha256)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """Create, rotate, revoke, list and find keys."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(
        self,
        consumer: str,
        scope: Scope,
        *,
        pin: int | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[Key, str]:
        """Return a new key of ``consumer`` and its secret, which is not kept.

        A ``pin`` is the default version of the consumer, that is of all its keys. It is set with
        its first key: a later key never changes what the older ones are answered with.

        Raises:
            Conflict: the consumer exists and has another pin, or none.
            UnknownVersion, VersionRetired: the pin is no version, or none that is served.
            InvalidInput: the name cannot be one, or the expiry is over.
        """
        _demand_name(consumer)
        with self._db.write() as connection:
            _demand_to_come(connection, expires_at)
            owner = _consumer(connection, consumer, pin)
            return _insert(connection, owner, scope, expires_at)

    def rotate(
        self, prefix: str, overlap: timedelta, *, expires_at: datetime | None = None
    ) -> tuple[Key, str]:
        """Return a new key of the same consumer and scope, and its secret, which is not kept.

        The old key expires after ``overlap``, by the database's clock, or is revoked where that is
        zero. The new one lives as long as the old was made to, unless ``expires_at`` says else.

        Raises:
            UnknownKey: there is no such key.
            Conflict: it is not in force, or was rotated before.
            InvalidInput: the expiry is over.
        """
        with self._db.write() as connection:
            _demand_to_come(connection, expires_at)
            now, old = clock(connection), _hold(connection, prefix)
            _demand_rotatable(old, now)
            if expires_at is None and old.expires_at is not None:
                expires_at = _after(now, old.expires_at - old.created_at)
            owner = select(tables.api_keys.c.consumer).where(tables.api_keys.c.prefix == prefix)
            new, secret = _insert(
                connection, connection.execute(owner).scalar_one(), old.scope, expires_at
            )
            until = min(now + overlap, old.expires_at or now + overlap)
            end = {"expires_at": until} if overlap else {"revoked_at": now}
            _change(connection, prefix, successor=new.prefix, **end)
            return new, secret

    def find(self, prefix: str) -> Key | None:
        """Return the key with this prefix, in force or not."""
        with self._db.read() as connection:
            row = connection.execute(_select().where(tables.api_keys.c.prefix == prefix)).first()
        return None if row is None else _key(row)

    def find_many(self, prefixes: Collection[str]) -> dict[str, Key]:
        """Return those of the keys with these prefixes that there are, in force or not."""
        found: dict[str, Key] = {}
        wanted = list(prefixes)
        with self._db.read() as connection:
            for start in range(0, len(wanted), _PREFIXES):
                piece = tables.api_keys.c.prefix.in_(wanted[start : start + _PREFIXES])
                rows = connection.execute(_select().where(piece))
                found.update((row.prefix, _key(row)) for row in rows)
        return found

    def all(self) -> list[Key]:
        """Return every key, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute(_select().order_by(tables.api_keys.c.created_at))
            return [_key(row) for row in rows]

    def revoke(self, prefix: str, *, spare_last_admin: bool = False) -> Key:
        """Revoke a key by its prefix, and return it; revoking twice changes nothing.

        Raises:
            UnknownKey: there is no such key.
            LastAdminKey: no other key with scope admin is in force, but ones that were rotated, and
                that was to be spared.
        """
        with self._db.write() as connection:
            now = clock(connection)
            if spare_last_admin:
                _spare_last_admin(connection, prefix, now)
            if _hold(connection, prefix).revoked_at is None:
                _change(connection, prefix, revoked_at=now)
            return _hold(connection, prefix)


def _insert(
    connection: Connection, consumer: int, scope: Scope, expires_at: datetime | None
) -> tuple[Key, str]:
    """Write a new key; return it and its secret.

    It is read here, not when all is done: a registry that went away then would take with it the
    only answer that ever holds the secret.
    """
    prefix = secrets.token_hex(_PREFIX_BYTES)
    secret = f"bc_{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    row = insert(tables.api_keys).values(
        prefix=prefix,
        sha256=_hash(secret),
        consumer=consumer,
        scope=scope,
        created_at=clock(connection),
        expires_at=expires_at,
    )
    try:
        with connection.begin_nested():
            connection.execute(row)
    except IntegrityError:  # another key has this prefix
        return _insert(connection, consumer, scope, expires_at)
    return _hold(connection, prefix), secret


def _demand_name(consumer: str) -> None:
    name = consumer.strip()
    if not name or len(consumer) > 128:
        raise InvalidInput("A consumer's name has 1 to 128 characters.")
    if name.startswith("cli:"):
        raise InvalidInput("A consumer's name does not begin with cli:, which stands for commands.")
    if name == ANONYMOUS:
        raise InvalidInput(f"{ANONYMOUS} stands for callers without a key; name another one.")
    if name != consumer or not name.isprintable():  # it stands in lines of logs and tables
        raise InvalidInput(
            f"The consumer's name {consumer!r} has a blank at an end, or a character that "
            "does not print; leave it out."
        )


def _demand_to_come(connection: Connection, expires_at: datetime | None) -> None:
    if expires_at is not None and expires_at.tzinfo is None:
        raise InvalidInput(f"The expiry {expires_at.isoformat()} has no zone; add Z or +00:00.")
    if expires_at is not None and expires_at <= clock(connection):
        raise InvalidInput(
            f"The expiry {expires_at.isoformat()} is over; name a moment that is to come."
        )


def _after(now: datetime, duration: timedelta) -> datetime:
    """Return the moment that is ``duration`` later, at most the last that there is."""
    return _LAST if duration > _LAST - now else now + duration


def _hold(connection: Connection, prefix: str) -> Key:
    """Return a key, which nobody else changes before the caller's transaction ends."""
    mine = _select().where(tables.api_keys.c.prefix == prefix)
    row = connection.execute(mine.with_for_update(of=tables.api_keys)).first()
    if row is None:
        raise UnknownKey(prefix)
    return _key(row)


def _demand_rotatable(key: Key, now: datetime) -> None:
    if key.successor is not None:
        raise Conflict(
            f"Key {key.prefix} was rotated to {key.successor} before; rotate that one, or revoke "
            "it.",
            successor=key.successor,
        )
    state = key.state(now)
    if state is not KeyState.IN_FORCE:
        raise Conflict(f"Key {key.prefix} is {state} and cannot be rotated; create a new one.")


def _spare_last_admin(connection: Connection, prefix: str, now: datetime) -> None:
    keys = tables.api_keys.c
    # In one order, and held: two that revoke each other's key come one after the other.
    admins = _select().where(keys.scope == Scope.ADMIN).order_by(keys.prefix)
    held = connection.execute(admins.with_for_update(of=tables.api_keys))
    in_force = [key for key in map(_key, held) if key.in_force(now)]
    # One that was rotated is in force only while its holder takes up the successor.
    lasting = {key.prefix for key in in_force if key.successor is None}
    if prefix in {key.prefix for key in in_force} and not lasting - {prefix}:
        raise LastAdminKey(prefix)


def _change(connection: Connection, prefix: str, **values: Any) -> None:
    mine = update(tables.api_keys).where(tables.api_keys.c.prefix == prefix)
    connection.execute(mine.values(**values))


def _consumer(connection: Connection, name: str, pin: int | None) -> int:
    if pin is not None:
        demand_pinnable(connection, pin)
    row = connection.execute(
        select(tables.consumers).where(tables.consumers.c.name == name)
    ).first()
    if row is None:
        new = insert(tables.consumers).values(name=name, pin=pin, created_at=utc_now())
        try:
            with connection.begin_nested():
                made = connection.execute(new.returning(tables.consumers.c.id))
                return int(made.scalar_one())
        except IntegrityError:  # its first key elsewhere was made meanwhile
            return _consumer(connection, name, pin)
    if pin not in (None, row.pin):
        raise Conflict(
            f"Consumer {name!r} has {'no pin' if row.pin is None else f'the pin {row.pin}'}, and "
            f"its other keys would change their version with a pin of {pin}. "
            "Create the key without a pin, or for another consumer.",
            consumer=name,
            pin=row.pin,
        )
    return int(row.id)


def _select() -> Any:
    keys, consumers = tables.api_keys, tables.consumers
    return select(
        keys.c.prefix,
        keys.c.sha256,
        keys.c.scope,
        consumers.c.name.label("consumer"),
        consumers.c.pin,
        keys.c.created_at,
        keys.c.expires_at,
        keys.c.revoked_at,
        keys.c.successor,
    ).join(consumers, consumers.c.id == keys.c.consumer)


def _key(row: Row[Any]) -> Key:
    values = dict(row._mapping)
    return Key(**{**values, "scope": Scope(values["scope"])})
