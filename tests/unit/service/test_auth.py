"""Who may do what, and how soon a revocation is felt."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from backcast.errors import Forbidden, Unauthorized
from backcast.registry.keys import Keys
from backcast.versions import Key, Scope
from service.auth import KeyRing, bearer_secret, demand
from tests.service_support import expire
from tests.support import Home, build_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), published=False) as built:
        yield built


@pytest.fixture
def keys(home: Home) -> Keys:
    return home.backcast.registry.keys


def identify(ring: KeyRing, secret: str) -> Key:
    return anyio.run(ring.identify, secret)


@pytest.mark.parametrize(
    ("header", "secret"),
    [
        (None, None),
        ("Bearer bc_1_2", "bc_1_2"),
        ("bearer bc_1_2", "bc_1_2"),
        ("  BEARER   bc_1_2  ", "bc_1_2"),
    ],
)
def test_secret_is_read_from_the_header(header: str | None, secret: str | None) -> None:
    assert bearer_secret(header) == secret


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic dTpw", "bc_1_2"])
def test_other_headers_are_refused(header: str) -> None:
    with pytest.raises(Unauthorized, match="Bearer <key>"):
        bearer_secret(header)


def test_key_is_found_by_its_secret(keys: Keys) -> None:
    key, secret = keys.create("search", Scope.READ, pin=1)
    found = identify(KeyRing(keys, 5.0), secret)
    assert found == key
    assert (found.consumer, found.pin) == ("search", 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda secret: "",
        lambda secret: "nonsense",
        lambda secret: "bc_00000000_" + secret.rpartition("_")[2],
        lambda secret: secret[:-1] + ("A" if secret[-1] != "A" else "B"),
        lambda secret: secret + "A",
    ],
    ids=["empty", "malformed", "unknown prefix", "wrong secret", "longer"],
)
def test_wrong_and_unknown_secrets_are_told_alike(keys: Keys, change: object) -> None:
    assert callable(change)
    _, secret = keys.create("search", Scope.READ)
    with pytest.raises(Unauthorized) as raised:
        identify(KeyRing(keys, 5.0), change(secret))
    assert raised.value.message == "This key is not known here."
    assert raised.value.data == {}


def test_holder_learns_of_expiry_and_revocation(home: Home, keys: Keys) -> None:
    late, late_secret = keys.create("search", Scope.READ)
    expire(home, late.prefix, datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(Unauthorized, match="has expired"):
        identify(KeyRing(keys, 5.0), late_secret)
    gone, gone_secret = keys.create("search", Scope.READ)
    keys.revoke(gone.prefix)
    with pytest.raises(Unauthorized, match="was revoked"):
        identify(KeyRing(keys, 5.0), gone_secret)
    with pytest.raises(Unauthorized, match="not known"):
        identify(KeyRing(keys, 5.0), gone_secret + "x")


def test_key_expires_while_it_is_remembered(home: Home, keys: Keys) -> None:
    key, secret = keys.create("search", Scope.READ)
    expire(home, key.prefix, datetime.now(UTC) + timedelta(seconds=0.5))
    ring = KeyRing(keys, 3600.0)
    assert identify(ring, secret).prefix == key.prefix
    time.sleep(0.5)
    with pytest.raises(Unauthorized, match="has expired"):
        identify(ring, secret)


def test_revocation_is_felt_when_the_memory_is_stale(keys: Keys) -> None:
    key, secret = keys.create("search", Scope.READ)
    trusting, doubting = KeyRing(keys, 3600.0), KeyRing(keys, 0.0)
    for ring in (trusting, doubting):
        identify(ring, secret)
    keys.revoke(key.prefix)
    assert identify(trusting, secret).prefix == key.prefix
    with pytest.raises(Unauthorized, match="was revoked"):
        identify(doubting, secret)


def test_unknown_prefixes_are_not_remembered(keys: Keys) -> None:
    ring = KeyRing(keys, 3600.0)
    for n in range(20):
        with pytest.raises(Unauthorized):
            identify(ring, f"bc_{n:08x}_guess")
    assert ring._found == {}


def test_scopes(keys: Keys) -> None:
    reader, _ = keys.create("search", Scope.READ)
    admin, _ = keys.create("team", Scope.ADMIN)
    assert demand(reader, Scope.READ) is reader
    assert demand(admin, Scope.READ) is admin
    assert demand(admin, Scope.ADMIN) is admin
    with pytest.raises(Forbidden):
        demand(reader, Scope.ADMIN)
    with pytest.raises(Unauthorized):
        demand(None, Scope.READ)
