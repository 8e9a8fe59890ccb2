"""Who may do what, and how soon a revocation is felt."""

import hashlib
import hmac
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest

from backcast.errors import Forbidden, Overloaded, RegistryError, Unauthorized
from backcast.registry.keys import Keys
from backcast.versions import Key, Scope
from service import auth
from service.auth import KeyRing, bearer_secret, demand
from tests.service_support import expire
from tests.support import Home, build_home


@pytest.fixture(autouse=True)
def _servers_are_waited_for() -> None:
    """As long as it is in a replica."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), published=False) as built:
        yield built


@pytest.fixture
def keys(home: Home) -> Keys:
    return home.backcast.registry.keys


class Clock:
    """The time that the key ring sees, which stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds, self._begun = 0.0, datetime.now(UTC)

    def monotonic(self) -> float:
        return self.seconds

    def utc_now(self) -> datetime:
        return self._begun + timedelta(seconds=self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(auth, "time", made)
    monkeypatch.setattr(auth, "utc_now", made.utc_now)
    return made


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
        lambda secret: "bc_00000000_" + secret.split("_", 2)[2],
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


def test_digests_are_compared_in_constant_time(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def watch(given: str, kept: str) -> bool:
        compared.append((given, kept))
        return compare(given, kept)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    key, secret = keys.create("search", Scope.READ)
    wrong = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    unknown = f"bc_00000000_{secret.split('_', 2)[2]}"
    assert identify(KeyRing(keys, 5.0), secret) == key
    for refused in (wrong, unknown):
        with pytest.raises(Unauthorized, match="not known"):
            identify(KeyRing(keys, 5.0), refused)
    # SHA-256, which nobody can steer towards one that is kept; of an unknown prefix none is.
    digests = [hashlib.sha256(sent.encode()).hexdigest() for sent in (secret, wrong)]
    assert compared == [(digest, key.sha256) for digest in digests]


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


def test_key_expires_while_it_is_remembered(home: Home, keys: Keys, clock: Clock) -> None:
    key, secret = keys.create("search", Scope.READ)
    expire(home, key.prefix, clock.utc_now() + timedelta(seconds=60))
    ring = KeyRing(keys, 3600.0)
    assert identify(ring, secret).prefix == key.prefix
    clock.seconds += 60
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


class Withheld:
    """The registry's keys, which can be taken away."""

    HANGS_S = 20

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.asked = 0
        self.away = False
        self.hanging, self.reached = threading.Event(), threading.Semaphore(0)
        self.hanging.set()

    def find(self, prefix: str) -> Key | None:
        self._answer()
        return self._keys.find(prefix)

    def find_many(self, prefixes: Collection[str]) -> dict[str, Key]:
        self._answer()
        return self._keys.find_many(prefixes)

    def _answer(self) -> None:
        self.asked += 1
        self.reached.release()
        self.hanging.wait(self.HANGS_S)
        if self.away:
            raise RegistryError("away")


class TestOutage:
    """A registry that fails, and one that hangs."""

    @pytest.fixture
    def registry(self, keys: Keys) -> Iterator[Any]:
        made = Withheld(keys)
        yield made
        made.hanging.set()

    @pytest.fixture
    def secret(self, keys: Keys) -> str:
        return keys.create("search", Scope.READ)[1]

    def test_key_seen_before_is_trusted_and_an_unknown_one_is_not(
        self, keys: Keys, registry: Any, secret: str
    ) -> None:
        ring = KeyRing(registry, 0.0, 60.0)
        _, stranger = keys.create("search", Scope.READ)
        identify(ring, secret)
        registry.away = True
        assert identify(ring, secret).consumer == "search"
        assert ring.recall(secret) is not None
        for wrong in (stranger, "bc_00000000_x"):
            with pytest.raises(RegistryError):
                identify(ring, wrong)
        with pytest.raises(Unauthorized):
            identify(ring, "nonsense")
        with pytest.raises(Unauthorized, match="not known"):
            identify(ring, secret + "x")

    def test_trust_ends_with_the_outage_time(
        self, registry: Any, secret: str, clock: Clock
    ) -> None:
        ring = KeyRing(registry, 0.0, 60.0)
        identify(ring, secret)
        registry.away = True
        for _ in range(60):
            identify(ring, secret)
            clock.seconds += 1
        with pytest.raises(RegistryError):
            identify(ring, secret)
        assert ring.recall(secret) is None

    def test_each_outage_has_its_own_time(self, registry: Any, secret: str, clock: Clock) -> None:
        ring = KeyRing(registry, 0.0, 6.0)
        identify(ring, secret)
        for _ in range(2):
            registry.away = True
            with pytest.raises(RegistryError):
                ring.refresh()
            clock.seconds += 4
            assert identify(ring, secret).consumer == "search"
            registry.away = False
            ring.refresh()

    def test_after_a_failure_nobody_asks_for_a_second(
        self, registry: Any, secret: str, clock: Clock
    ) -> None:
        ring = KeyRing(registry, 3600.0, 60.0)
        registry.away = True
        for _ in range(5):
            with pytest.raises(RegistryError):
                identify(ring, secret)
        assert registry.asked == 1
        registry.away = False
        clock.seconds += 1
        assert identify(ring, secret).consumer == "search"

    def test_administrators_are_always_looked_up(
        self, keys: Keys, registry: Any, secret: str
    ) -> None:
        ring = KeyRing(registry, 3600.0, 3600.0)
        identify(ring, secret)
        registry.away = True
        with pytest.raises(RegistryError):
            anyio.run(ring.confirm, secret)
        registry.away = False
        ring.refresh()
        keys.revoke(secret.split("_")[1])
        with pytest.raises(Unauthorized, match="was revoked"):
            anyio.run(ring.confirm, secret)

    def test_all_keys_seen_are_confirmed_together(
        self, keys: Keys, registry: Any, clock: Clock
    ) -> None:
        ring = KeyRing(registry, 3.0, 60.0)
        made = [keys.create("search", Scope.READ) for _ in range(3)]
        for _, secret in made:
            identify(ring, secret)
        keys.revoke(made[0][0].prefix)
        asked = registry.asked
        clock.seconds += 3
        assert ring.recall(made[1][1]) is None
        ring.refresh()
        assert registry.asked == asked + 1
        assert [ring.recall(secret) for _, secret in made[1:]] == [key for key, _ in made[1:]]
        with pytest.raises(Unauthorized, match="was revoked"):
            ring.recall(made[0][1])

    def test_a_flood_of_wrong_keys_is_not_taken_for_an_outage(
        self, keys: Keys, registry: Any, secret: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "_PATIENCE_S", 0.2)
        monkeypatch.setattr(registry, "find", lambda _: time.sleep(0.02))
        ring, refusals = KeyRing(registry, 0.0, 60.0), Counter[type[Exception]]()

        async def ask(number: int) -> None:
            try:
                await ring.identify(f"bc_{number:08x}_guess")
            except (Unauthorized, RegistryError, Overloaded) as error:
                refusals[type(error)] += 1

        async def flood() -> None:
            async with anyio.create_task_group() as tasks:
                for number in range(200):
                    tasks.start_soon(ask, number)

        anyio.run(flood)
        assert refusals.keys() == {Unauthorized, Overloaded}
        assert ring.recall(secret) is None
        monkeypatch.undo()
        assert identify(ring, secret).consumer == "search"

    def test_a_flood_of_made_up_keys_holds_up_nobody(
        self, keys: Keys, registry: Any, secret: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "_PATIENCE_S", 10.0)
        ring, withheld = KeyRing(registry, 0.0), registry.find
        key = identify(ring, secret)
        registry.hanging.clear()
        monkeypatch.setattr(
            registry, "find", lambda p: keys.find(p) if p == key.prefix else withheld(p)
        )

        async def ask(number: int) -> None:
            with suppress(Unauthorized):
                await ring.identify(f"bc_{number:08x}_guess")

        async def flood() -> None:
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(ask, number)
                await anyio.wait_all_tasks_blocked()
                try:
                    with anyio.fail_after(5):
                        assert await ring.identify(secret) == key
                        assert await ring.confirm(secret) == key
                finally:
                    registry.hanging.set()

        anyio.run(flood)

    def test_wrong_secret_of_a_key_seen_is_no_question_to_the_registry(
        self, registry: Any, secret: str
    ) -> None:
        ring, wrong = KeyRing(registry, 0.0), secret[:-1] + ("A" if secret[-1] != "A" else "B")
        identify(ring, secret)
        for ask in (ring.identify, ring.confirm):
            with pytest.raises(Unauthorized, match="not known"):
                anyio.run(ask, wrong)
        assert registry.asked == 1

    def test_many_with_the_same_new_key_wait_for_the_first_of_them(
        self, registry: Any, secret: str
    ) -> None:
        ring = KeyRing(registry, 3600.0)

        async def crowd() -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(ring.identify, secret)

        anyio.run(crowd)
        assert registry.asked <= 2

    def test_registry_that_hangs_is_waited_for_once_and_briefly(
        self, registry: Any, secret: str, clock: Clock
    ) -> None:
        ring = KeyRing(registry, 0.0, 60.0)
        identify(ring, secret)
        registry.hanging.clear()
        started = time.monotonic()
        for _ in range(2):
            assert identify(ring, secret).consumer == "search"
            assert registry.asked == 2  # once before it hung
        assert time.monotonic() - started < Withheld.HANGS_S / 2

    def test_confirmation_that_hangs_tells_before_anybody_waits(
        self, registry: Any, secret: str, clock: Clock
    ) -> None:
        ring = KeyRing(registry, 0.0, 60.0)
        identify(ring, secret)
        registry.hanging.clear()
        with ThreadPoolExecutor(1) as pool:
            confirming = pool.submit(ring.refresh)
            assert all(registry.reached.acquire(timeout=20) for _ in range(2))
            assert ring.recall(secret) is None
            clock.seconds += 1.1
            assert ring.recall(secret) is not None
            registry.hanging.set()
            confirming.result(20)
        assert ring.recall(secret) is None  # it answers, so it must be asked again

    def test_late_answer_does_not_undo_a_newer_one(
        self, keys: Keys, registry: Any, secret: str
    ) -> None:
        ring = KeyRing(registry, 3600.0)
        key = identify(ring, secret)
        keys.revoke(key.prefix)
        with pytest.raises(Unauthorized, match="was revoked"):
            anyio.run(ring.confirm, secret)
        ring._remember(key.prefix, key, time.monotonic() - 1)
        with pytest.raises(Unauthorized, match="was revoked"):
            ring.recall(secret)


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
