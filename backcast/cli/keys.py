"""Commands about keys: create, rotate, revoke, list."""

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from backcast import acts
from backcast.cli.acting import Reason, acting
from backcast.cli.moments import read_duration, read_moment_or_duration
from backcast.cli.output import print_json, print_table, say
from backcast.registry import Registry, open_registry
from backcast.registry.keys import prefix_of
from backcast.settings import Settings
from backcast.versions import Key, KeyState, Scope

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
_Prefix = Annotated[
    str,
    typer.Argument(
        metavar="PREFIX",
        help="The eight digits after `bc_`, as `keys list` shows them; the whole key does too, but "
        "others on this host may read it.",
        show_default=False,
    ),
]

app = typer.Typer(no_args_is_help=True, help="Create, rotate, revoke and list API keys.")


@app.command(
    "create",
    epilog="Example: backcast keys create --consumer ranking --scope read --pin 0 --expires 90d",
)
def create_key(
    consumer: Annotated[str, typer.Option(help="Who will use the key.", show_default=False)],
    scope: Annotated[Scope, typer.Option(help="What it may do.")] = Scope.READ,
    pin: Annotated[
        int | None,
        typer.Option(help="Version a new consumer gets, with any of its keys, when it names none."),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            help="When: a day (its beginning in UTC), a moment with a zone, or after so long: 30d.",
            show_default="never",
        ),
    ] = None,
    reason: Reason = None,
    as_json: _AsJson = False,
) -> None:
    """Create a key. Its secret is shown now and never again."""
    with open_registry(Settings.load()) as registry:
        expires_at = _moment(registry, expires)
        act = acts.creating_key(consumer, scope, pin, expires_at, reason)
        with acting(registry, act) as recorded:
            key, secret = registry.keys.create(consumer, scope, pin=pin, expires_at=expires_at)
            recorded.found["key"] = key.prefix
    _show(key, secret, as_json)


@app.command("rotate", epilog="Example: backcast keys rotate 1a2b3c4d --overlap 24h")
def rotate_key(
    key: _Prefix,
    overlap: Annotated[
        str, typer.Option(help="How long the old key is in force yet; 0 revokes it.")
    ] = "24h",
    expires: Annotated[
        str | None,
        typer.Option(
            help="When the new key expires, as of `keys create`.",
            show_default="it lives as long as the old one was made to",
        ),
    ] = None,
    reason: Reason = None,
    as_json: _AsJson = False,
) -> None:
    """Make the successor of a key, for the same consumer and scope; its secret is shown once."""
    prefix, lasting = prefix_of(key), read_duration("--overlap", overlap)
    with open_registry(Settings.load()) as registry:
        expires_at = _moment(registry, expires)
        act = acts.rotating_key(prefix, lasting.total_seconds(), reason)
        with acting(registry, act) as recorded:
            made, secret = registry.keys.rotate(prefix, lasting, expires_at=expires_at)
            recorded.found["key"] = made.prefix
    _show(made, secret, as_json)


@app.command("revoke", epilog="Example: backcast keys revoke 1a2b3c4d --reason 'left the team'")
def revoke_key(key: _Prefix, reason: Reason = None) -> None:
    """Revoke a key; replicas follow within BACKCAST_KEY_CACHE_SECONDS."""
    prefix = prefix_of(key)
    with (
        open_registry(Settings.load()) as registry,
        acting(registry, acts.revoking_key(prefix, False, reason)),
    ):
        registry.keys.revoke(prefix)
    say(f"Key {prefix} is revoked.")


@app.command("list", epilog="Example: backcast keys list --json")
def list_keys(as_json: _AsJson = False) -> None:
    """List the keys, without their secrets."""
    with open_registry(Settings.load()) as registry:
        keys, now = registry.keys.all(), registry.now()
    if as_json:
        print_json([_document(key, now) for key in keys])
    elif not keys:
        say("There is no key yet. Create one: backcast keys create --help")
    else:
        print_table(
            ("prefix", "consumer", "scope", "pin", "state", "expires", "rotated to"),
            [_row(key, now) for key in keys],
        )


def _row(key: Key, now: datetime) -> tuple[object, ...]:
    expires = None if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
    state = key.state(now)
    shown = expires if state is not KeyState.REVOKED else None
    return key.prefix, key.consumer, key.scope, key.pin, state, shown, key.successor


def _moment(registry: Registry, text: str | None) -> datetime | None:
    if text is None:
        return None
    found = read_moment_or_duration("--expires", text)
    return registry.now() + found if isinstance(found, timedelta) else found


def _show(key: Key, secret: str, as_json: bool) -> None:
    if as_json:
        print_json({"key": secret, **_document(key, key.created_at)})
    else:
        say(secret)


def _document(key: Key, now: datetime) -> dict[str, Any]:
    document = asdict(key)
    del document["sha256"]
    return {**document, "state": key.state(now)}
