"""The client against the real service, and against answers that Backcast would never give."""

import inspect
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pytest
from anyio import to_thread
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from backcast import client as client_module
from backcast import errors
from backcast.client import AsyncClient, Client, Embeddings, VersionInfo
from backcast.errors import BackcastError, ConfigError, InvalidInput, ServiceError
from backcast.lifecycle import sweep
from backcast.vectors import MAX_ID_BYTES
from backcast.versions import Entity, VersionState
from backcast.versions import Scope as KeyScope
from service.app import create_app
from tests.servers import free_port
from tests.service_support import ODD_IDS, assert_served, bearer, publish_ids, running, secret_of
from tests.support import Home, build_home


class Waiting:
    """An AsyncClient that is waited for, so that one suite runs on both."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._leaving = ExitStack()
        self._portal = self._leaving.enter_context(start_blocking_portal())
        try:
            self._client = self._portal.call(partial(AsyncClient, *arguments, **options))
            self._leaving.enter_context(self._portal.wrap_async_context_manager(self._client))
        except BaseException:
            self._leaving.close()
            raise

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.close()

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_chunk":  # the one thing that tests change
            self._client._chunk = int(str(value))
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *arguments, **options: self._portal.call(
            partial(found, *arguments, **options)
        )


Kind = Callable[..., Any]
"""Makes a client that can be used as a context manager."""

ANY_ID = st.text(min_size=1, max_size=40).filter(
    lambda id: len(id.encode(errors="replace")) <= MAX_ID_BYTES and _is_unicode(id)
)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@pytest.fixture(scope="module", params=[Client, Waiting], ids=["client", "async client"])
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Version 1 is live and has vectors of odd ids."""
    with build_home(tmp_path_factory.mktemp("home"), bias=True) as built:
        for version in (0, 1):
            publish_ids(built, version, ODD_IDS)
            built.promote(version)
        yield built


@pytest.fixture(scope="module")
def url(home: Home) -> Iterator[str]:
    with running(create_app(home.settings)) as served:
        yield served


@pytest.fixture(scope="module")
def client(kind: Kind, home: Home, url: str) -> Iterator[Any]:
    with kind(url, secret_of(home, KeyScope.ADMIN)) as opened:
        yield opened


@contextmanager
def answering(kind: Kind, answer: Callable[[Request], Awaitable[Response]]) -> Iterator[Any]:
    """Yield a client of a server that answers whatever ``answer`` returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
            return
        await (await answer(Request(scope, receive)))(scope, receive, send)

    with running(app) as url, kind(url, "key") as client:
        yield client


class TestOneVector:
    @pytest.mark.parametrize("id", ODD_IDS, ids=lambda id: ascii(id)[:20])
    def test_id_stays_what_it_is(self, home: Home, client: Any, id: str) -> None:
        assert_served(client.get(id, 0)[np.newaxis], home, [id], 0, live=1)

    @given(id=ANY_ID.filter(lambda id: id not in ODD_IDS))
    def test_any_id_arrives_as_it_is(self, client: Any, id: str) -> None:
        with pytest.raises(errors.UnknownId) as raised:
            client.get(id, 0)
        assert raised.value.data["id"] == id

    @pytest.mark.parametrize("entity", Entity)
    @pytest.mark.parametrize("version", [0, 1, "live"])
    def test_vector_is_the_arithmetic(
        self, home: Home, client: Any, version: Any, entity: Entity
    ) -> None:
        vector = client.get("007", version, entity)
        target = 1 if version == "live" else version
        assert_served(vector[np.newaxis], home, ["007"], target, entity, live=1)
        vector += 1  # the caller's own

    @pytest.mark.parametrize("id", ["", "x" * 1025, "\ud800"], ids=ascii)
    def test_id_that_cannot_be_one(self, client: Any, id: str) -> None:
        with pytest.raises(InvalidInput):
            client.get(id, 0)


class TestManyVectors:
    @pytest.mark.parametrize("entity", Entity)
    def test_ids_stay_what_they_are(self, home: Home, client: Any, entity: Entity) -> None:
        result = client.get_many(ODD_IDS, 0, entity)
        assert result.ids == ODD_IDS
        assert result.found.all()
        assert result.missing == ()
        assert_served(result.vectors, home, ODD_IDS, 0, entity, live=1)
        live = home.backcast.registry.deployments.live()
        assert live is not None
        assert (result.version, result.live_version, result.dim) == (0, 1, 4)
        assert result.snapshot == f"{live.snapshot}.0"

    @pytest.mark.parametrize("chunk", [3, 10_000])
    def test_drift_bounds_are_those_of_the_service(
        self, kind: Kind, home: Home, url: str, chunk: int
    ) -> None:
        ids, secret = [*ODD_IDS, "nobody"], secret_of(home)
        asked = {"ids": ids, "version": 0, "drift": True}
        told = httpx2.post(f"{url}/embeddings/batch", json=asked, headers=bearer(secret)).json()
        bounds = [row.get("drift_bound") for row in told["embeddings"]]
        assert max(bound or 0 for bound in bounds) > 0
        assert bounds[-1] is None
        with kind(url, secret) as client:
            client._chunk = chunk
            result = client.get_many(ids, 0, drift=True)
            assert client.get_many(ids, 0).drift is None
        assert result.drift.dtype == np.float32
        assert result.drift.flags.writeable
        wanted = np.array([np.nan if bound is None else bound for bound in bounds])
        np.testing.assert_allclose(result.drift, wanted, rtol=1e-6)

    @given(ids=st.lists(ANY_ID | st.sampled_from(ODD_IDS), max_size=12))
    def test_order_duplicates_and_missing_are_kept(
        self, home: Home, client: Any, ids: list[str]
    ) -> None:
        result = client.get_many(ids, "live")
        known = [id in ODD_IDS for id in ids]
        assert result.ids == tuple(ids)
        assert result.found.tolist() == known
        assert list(result.missing) == list(dict.fromkeys(id for id in ids if id not in ODD_IDS))
        assert result.vectors.shape == (len(ids), 6)
        assert np.isnan(result.vectors[~result.found]).all()
        found = [id for id in ids if id in ODD_IDS]
        assert_served(result.vectors[result.found], home, found, 1, live=1)

    def test_no_ids(self, client: Any) -> None:
        result = client.get_many([], 0)
        assert (result.vectors.shape, result.dim, result.version) == ((0, 4), 4, 0)

    def test_id_that_cannot_be_sent(self, client: Any) -> None:
        with pytest.raises(InvalidInput):
            client.get_many(["\ud800"], 0)

    @pytest.mark.parametrize("count", [1, 4, 5, 9])
    def test_many_ids_go_in_several_batches(
        self, kind: Kind, home: Home, count: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client_module, "_CHUNK", 8)
        capped = home.settings.model_copy(update={"max_batch": 4})
        sizes: list[int] = []
        ids = list(ODD_IDS[:count])
        ids[-1] = "nobody"
        with (
            running(
                watching(create_app(capped), lambda body: sizes.append(len(body["ids"])))
            ) as url,
            kind(url, secret_of(home)) as client,
        ):
            result = client.get_many(ids, 0)
            assert result.ids == tuple(ids)
            assert result.missing == ("nobody",)
            assert_served(result.vectors[:-1], home, ids[:-1], 0, live=1)
            # The first refusal taught the client how much the service takes.
            client.get_many(ids, 0)
        too_large = [min(8, count)] if count > 4 else []
        pieces = [min(4, count - at) for at in range(0, count, 4)]
        assert sizes == too_large + pieces + pieces

    def test_later_batches_name_the_version_that_the_pin_gave(self, kind: Kind, home: Home) -> None:
        _, secret = home.backcast.registry.keys.create("pinned", KeyScope.READ, pin=0)
        capped = home.settings.model_copy(update={"max_batch": 4})
        asked: list[int | None] = []
        app = watching(create_app(capped), lambda body: asked.append(body["version"]))
        with running(app) as url, kind(url, secret) as client:
            client._chunk = 4
            assert client.get_many(list(ODD_IDS[:9])).version == 0
        assert asked == [None, 0, 0]

    @pytest.mark.parametrize("ids", ["007", b"007"])
    def test_one_string_is_no_list_of_ids(self, client: Any, ids: Any) -> None:
        with pytest.raises(InvalidInput, match="give a list"):
            client.get_many(ids, 0)

    def test_one_call_never_mixes_two_snapshots(self, kind: Kind, tmp_path: Path) -> None:
        with build_home(tmp_path, live=1) as home:
            ids = home.ids(version=1)
            with switching(kind, home, lambda call: call == 2) as client:
                result = client.get_many(ids, 0)
            assert result.live_version == 2
            assert_served(result.vectors, home, ids, 0, live=2)

    def test_snapshots_that_never_stay_are_given_up(self, kind: Kind, tmp_path: Path) -> None:
        with (
            build_home(tmp_path, live=1) as home,
            switching(kind, home, lambda call: call % 2 == 0) as client,
            pytest.raises(errors.SnapshotMismatch),
        ):
            client.get_many(home.ids(version=1), 0)


class TestDemandedSnapshot:
    """Several calls, one snapshot: the one demanded or an error, never a mixture."""

    @pytest.mark.parametrize("by", [lambda name: name, lambda name: name.rpartition(".")[0]])
    def test_every_call_is_answered_from_it(
        self, home: Home, client: Any, by: Callable[[str], str]
    ) -> None:
        name = client.get_many(["007"], 0).snapshot
        again = client.get_many(ODD_IDS, 0, snapshot=by(name))
        assert again.snapshot == name
        assert_served(again.vectors, home, ODD_IDS, 0, live=1)
        one = client.get("007", 0, snapshot=by(name))
        assert_served(one[np.newaxis], home, ["007"], 0, live=1)

    def test_one_that_is_not_served_is_refused_at_once(self, kind: Kind, home: Home) -> None:
        sent: list[Any] = []
        app = watching(create_app(home.settings), sent.append)
        with running(app) as url, kind(url, secret_of(home)) as client:
            with pytest.raises(errors.SnapshotMismatch) as raised:
                client.get_many(["007"], 0, snapshot="v0-gone.0")
            assert raised.value.data["expected_snapshot"] == "v0-gone.0"
            with pytest.raises(errors.SnapshotMismatch):
                client.get("007", 0, snapshot="v0-gone.0")
        assert len(sent) == 1  # asking again would change nothing

    def test_reading_goes_on_within_its_grace_and_ends_with_it(
        self, kind: Kind, tmp_path: Path
    ) -> None:
        with build_home(tmp_path, live=1) as home:
            ids = home.ids(version=1)
            settings = home.settings.model_copy(update={"poll_seconds": 3600.0})
            with running(create_app(settings)) as url, kind(url, secret_of(home)) as client:
                first = client.get_many(ids[:5], 0)
                new = home.promote(2)
                assert client.get_many(ids, 0, snapshot=new).live_version == 2
                second = client.get_many(ids[5:], 0, snapshot=first.snapshot)
                assert second.snapshot == first.snapshot
                together = np.concatenate([first.vectors, second.vectors])
                assert_served(together, home, ids, 0, live=1)
                sweep(home.backcast, timedelta(0))
                for demanded in ("one that makes it look again", first.snapshot):
                    with pytest.raises(errors.SnapshotMismatch):
                        client.get_many(ids, 0, snapshot=demanded)

    def test_answer_from_another_one_is_not_taken(self, kind: Kind, home: Home, url: str) -> None:
        """A proxy that answers from its memory, or drops the demand."""
        answers = [
            httpx2.get(
                f"{url}/embeddings/007?version=0",
                headers={"Accept": "application/octet-stream", **bearer(secret_of(home))},
            ),
            httpx2.post(
                f"{url}/embeddings/batch",
                json={"ids": ["007"], "version": 0},
                headers={
                    "Accept": "application/vnd.apache.arrow.stream",
                    **bearer(secret_of(home)),
                },
            ),
        ]

        async def answer(request: Request) -> Response:
            known = answers[request.method == "POST"]
            return Response(known.content, headers=dict(known.headers))

        with answering(kind, answer) as other:
            assert other.get("007", 0).shape == (4,)
            with pytest.raises(ServiceError, match="from snapshot v1-"):
                other.get("007", 0, snapshot="v1-other.0")
            with pytest.raises(ServiceError, match="from snapshot v1-"):
                other.get_many(["007"], 0, snapshot="v1-other")


def watching(app: FastAPI, note: Callable[[Any], None]) -> ASGIApp:
    """Return the app, with every batch shown to ``note`` before it is answered."""

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        await to_thread.run_sync(note, {**orjson.loads(body), "state": scope["state"]})

        async def again() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        await app(scope, again, send)

    return watched


@contextmanager
def switching(kind: Kind, home: Home, when: Callable[[int], bool]) -> Iterator[Any]:
    """Yield a client that asks for four ids at a time, and is overtaken ``when`` a call's number
    says: before it is answered another version goes live, and the old snapshot is gone at once.
    """
    calls = 0

    def overtake(body: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if when(calls):
            live = home.backcast.registry.deployments.live()
            assert live is not None
            other = 3 - live.version
            home.publish(other)
            home.promote(other, force=True, reason="to and fro")
            sweep(home.backcast, timedelta(0))
            body["state"]["service"].engine.refresh()

    settings = home.settings.model_copy(update={"max_batch": 4, "poll_seconds": 3600.0})
    with (
        running(watching(create_app(settings), overtake)) as url,
        kind(url, secret_of(home)) as client,
    ):
        client._chunk = 4
        yield client


class TestRefusals:
    @pytest.mark.parametrize(
        ("version", "error"),
        [
            (9, errors.UnknownVersion),
            (2, errors.VersionNotPromoted),
            (None, errors.VersionRequired),
        ],
    )
    def test_errors_are_those_of_the_service(
        self, client: Any, version: Any, error: type[BackcastError]
    ) -> None:
        calls: list[Callable[[], object]] = [
            lambda: client.get("007", version),
            lambda: client.get_many(["007"], version),
        ]
        for call in calls:
            with pytest.raises(error) as raised:
                call()
            assert type(raised.value) is error
            assert raised.value.data["servable_versions"] == [0, 1]
            assert "status" not in raised.value.data

    def test_pin_is_taken_where_no_version_is_named(self, kind: Kind, home: Home, url: str) -> None:
        with kind(url, secret_of(home, pin=0)) as client:
            assert client.get("007", None).shape == (4,)
            assert client.get_many(["007"], None).version == 0

    def test_key_that_is_none(self, kind: Kind, url: str) -> None:
        with kind(url, "bc_00000000_x") as client, pytest.raises(errors.Unauthorized):
            client.get("007", 0)
        with kind(url) as client, pytest.raises(errors.Unauthorized):
            client.versions()

    def test_key_that_does_not_reach_so_far(self, kind: Kind, home: Home, url: str) -> None:
        with kind(url, secret_of(home)) as client, pytest.raises(errors.Forbidden):
            client.promote(2, 1)

    def test_batch_that_cannot_be_made_smaller(self, kind: Kind) -> None:
        async def refuse(_: Request) -> Response:
            return problem(413, "batch-too-large", limit=0)

        with answering(kind, refuse) as client, pytest.raises(errors.BatchTooLarge):
            client.get_many(["a"], 0)


def problem(status: int, code: str, **data: Any) -> Response:
    document = {
        "type": f"urn:backcast:problem:{code}",
        "title": "Trouble",
        "status": status,
        "detail": "there is trouble",
        "instance": "/",
        **data,
    }
    return Response(orjson.dumps(document), status, media_type="application/problem+json")


class TestRefusedForNow:
    """A service that has too much to do says when to come again."""

    @staticmethod
    @contextmanager
    def refusing(
        kind: Kind, home: Home, times: int, status: int = 503, after: str | None = "0"
    ) -> Iterator[tuple[Any, list[str]]]:
        """Yield a client of a service that refuses so many requests first, and what it is sent."""
        service, sent = create_app(home.settings), list[str]()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                sent.append(scope["path"])
            if scope["type"] != "http" or len(sent) > times:
                await service(scope, receive, send)
                return
            response = problem(status, "overloaded")
            if after is not None:
                response.headers["Retry-After"] = after
            await response(scope, receive, send)

        with running(app) as url, kind(url, secret_of(home)) as client:
            yield client, sent

    @pytest.mark.parametrize("status", [429, 503])
    def test_reads_come_again(self, kind: Kind, home: Home, status: int) -> None:
        with self.refusing(kind, home, 3, status) as (client, sent):
            assert client.get("007", 0).shape == (4,)
            assert len(sent) == 4
        with self.refusing(kind, home, 2, status) as (client, sent):
            assert client.get_many(["007", "7"], 0).found.all()
            assert len(sent) == 3

    def test_not_for_ever(self, kind: Kind, home: Home) -> None:
        with self.refusing(kind, home, 9) as (client, sent):
            with pytest.raises(errors.Overloaded):
                client.get("007", 0)
            assert len(sent) == 4

    @pytest.mark.parametrize("after", ["11", "Wed, 21 Oct 2099 07:28:00 GMT", "soon", None])
    def test_not_when_that_takes_too_long_or_nobody_knows(
        self, kind: Kind, home: Home, after: str | None
    ) -> None:
        with self.refusing(kind, home, 9, after=after) as (client, sent):
            with pytest.raises(errors.Overloaded):
                client.get("007", 0)
            assert len(sent) == 1

    def test_what_changes_something_is_sent_once(self, kind: Kind, home: Home) -> None:
        with self.refusing(kind, home, 9) as (client, sent):
            with pytest.raises(errors.Overloaded):
                client.promote(1, 0)
            assert len(sent) == 1


class TestOtherServers:
    def test_nobody_answers(self, kind: Kind) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        with kind(url, "key") as client, pytest.raises(ServiceError) as raised:
            client.get("a", 0)
        assert url in raised.value.message
        assert "backcast serve" in raised.value.message

    def test_answer_that_takes_too_long(self, kind: Kind) -> None:
        async def wait(request: Request) -> Response:
            await request.body()
            while not await request.is_disconnected():
                pass
            return Response()

        with (
            answering(kind, wait) as slow,
            kind(slow.url, timeout=0.05) as client,
            pytest.raises(ServiceError, match="Timeout"),
        ):
            client.get("a", 0)

    @pytest.mark.parametrize(
        "answer",
        [
            Response("<html>", 200, media_type="text/html"),
            Response("<html>", 502, media_type="text/html"),
            Response(status_code=307, headers={"Location": "https://example.com"}),
            Response(b"\0" * 16, headers={"Backcast-Version": "1", "Backcast-Dim": "4"}),
            Response(b"\0" * 12, headers={"Backcast-Version": "0", "Backcast-Dim": "4"}),
            Response(b"\0" * 16, headers={"Backcast-Version": "0", "Backcast-Dim": "four"}),
            Response(b"\0" * 16, headers={"Backcast-Version": "0"}),
            problem(500, "something-new"),
        ],
        ids=["page", "gateway", "redirect", "version", "torn", "no number", "no dim", "code"],
    )
    def test_answers_that_are_not_what_was_asked_for(self, kind: Kind, answer: Response) -> None:
        async def give(_: Request) -> Response:
            return answer

        with answering(kind, give) as client:
            with pytest.raises(ServiceError):
                client.get("a", 0)
            with pytest.raises(ServiceError):
                client.get_many(["a"], 0)

    def test_batch_of_another_size(self, kind: Kind, home: Home, url: str) -> None:
        one = httpx2.post(
            f"{url}/embeddings/batch",
            json={"ids": ["007"], "version": 0},
            headers={"Accept": "application/vnd.apache.arrow.stream", **bearer(secret_of(home))},
        )

        async def give_one(_: Request) -> Response:
            return Response(one.content, headers=dict(one.headers))

        with answering(kind, give_one) as other:
            assert other.get_many(["007"], 0).found.all()
            with pytest.raises(ServiceError, match="shape"):
                other.get_many(["007", "7"], 0)


class TestSettings:
    def test_url_and_key_come_from_the_environment(
        self, kind: Kind, home: Home, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BACKCAST_URL", url + "/")
        monkeypatch.setenv("BACKCAST_KEY", secret_of(home))
        with kind() as client:
            assert client.url == url
            assert client.get("007", 0).shape == (4,)

    @pytest.mark.parametrize("around", ["{}\n", "{}\r", " {}\t"])
    def test_blanks_around_a_key_are_left_out(
        self, kind: Kind, home: Home, url: str, monkeypatch: pytest.MonkeyPatch, around: str
    ) -> None:
        key = around.format(secret_of(home))
        monkeypatch.setenv("BACKCAST_KEY", key)
        for argument in (key, None):
            with kind(url, argument) as client:
                assert client.get("007", 0).shape == (4,)

    @pytest.mark.parametrize("within", ["\n", "\r", "\0", " ", "ü", "…", "\ud800"])
    def test_key_that_cannot_be_one_is_not_shown(self, kind: Kind, url: str, within: str) -> None:
        with pytest.raises(ConfigError, match="a character that no key has") as raised:
            kind(url, f"bc_0123abcd_se{within}cret")
        assert "0123abcd" not in raised.value.message
        assert "cret" not in raised.value.message

    def test_error_of_the_transport_shows_no_key(self, url: str) -> None:
        with Client(url) as client, pytest.raises(ServiceError) as raised, client._translated():
            raise httpx2.LocalProtocolError("Illegal header value b'Bearer bc_0123abcd_secret'")
        assert "secret" not in raised.value.message

    @pytest.mark.parametrize("url", ["http://[::1", "http://host:port"])
    def test_url_that_is_none(self, kind: Kind, url: str) -> None:
        with pytest.raises(ConfigError, match="BACKCAST_URL"):
            kind(url)

    def test_url_without_scheme(self, kind: Kind) -> None:
        with kind("localhost:8000") as client, pytest.raises(ServiceError, match="BACKCAST_URL"):
            client.get("a", 0)


def test_versions(client: Any) -> None:
    versions = client.versions()
    assert [type(version) for version in versions] == [VersionInfo] * 3
    assert [(v.number, v.state, v.dim, v.parent, v.servable) for v in versions] == [
        (0, VersionState.SUPERSEDED, 4, None, True),
        (1, VersionState.LIVE, 6, 0, True),
        (2, VersionState.REGISTERED, 8, 1, False),
    ]
    assert versions[0].created_at.utcoffset() == timedelta(0)
    assert versions[0].deprecated_at is None


def test_promotion(kind: Kind, tmp_path: Path) -> None:
    with (
        build_home(tmp_path, live=0) as home,
        running(create_app(home.settings)) as url,
        kind(url, secret_of(home, KeyScope.ADMIN)) as client,
    ):
        with pytest.raises(errors.PromotionConflict):
            client.promote(1, None)
        operation = client.promote(1, 0)
        while operation["state"] not in {"succeeded", "failed"}:
            operation = client.operation(operation["id"])
        assert operation["result"]["live_version"] == 1
        with pytest.raises(errors.UnknownOperation):
            client.operation("none")


def test_client_needs_neither_torch_nor_a_web_framework() -> None:
    program = (
        "import sys, backcast.client;"
        "print(*{'torch', 'fastapi', 'starlette', 'uvicorn', 'sqlalchemy'} & {*sys.modules})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == ""


def test_exports_are_exact() -> None:
    own = {
        name
        for name, value in vars(client_module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == client_module.__name__
    }
    assert own | {"VersionName"} == set(client_module.__all__)


def test_embeddings_name_each_missing_id_once() -> None:
    vectors = np.zeros((4, 2), np.float32)
    found = np.array([False, True, False, False])
    result = Embeddings(("b", "a", "c", "b"), vectors, found, 0, 1, "v1-a.0")
    assert result.missing == ("b", "c")
    assert result.dim == 2


def test_both_clients_have_the_same_methods() -> None:
    def shown(kind: type) -> dict[str, list[str]]:
        return {
            name: [f"{p.name}={p.default}" for p in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert shown(Client) == shown(AsyncClient)
    assert {"get", "get_many", "versions", "promote", "operation", "close"} <= shown(Client).keys()
