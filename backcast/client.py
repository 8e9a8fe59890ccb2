"""The HTTP client: vectors of the version that a model was trained on, as float32 arrays.

    with Client("https://embeddings.example", key) as client:
        vector = client.get("B00005N7P0", version=1)            # (D_1,) float32
        batch = client.get_many(ids, version=1)                 # batch.vectors: (N, D_1) float32
        more = client.get_many(others, 1, snapshot=batch.snapshot)   # from the same, or refused

``AsyncClient`` is the same for an event loop. What the service refuses is raised as the class of
``backcast.errors`` that the service raised. A read that is refused with ``Retry-After``, for the
service is overloaded or the consumer over its rate, is sent again up to three times, when it says.
"""

import asyncio
import itertools
import random
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx2
import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from backcast.errors import (
    BackcastError,
    BatchTooLarge,
    ConfigError,
    InvalidInput,
    ServiceError,
    SnapshotMismatch,
)
from backcast.logs import redact
from backcast.settings import Settings
from backcast.vectors import check_id
from backcast.versions import Entity, VersionState

__all__ = ["AsyncClient", "Client", "Embeddings", "VersionInfo", "VersionName"]

VersionName = int | Literal["live"] | None
"""A version's number, ``"live"`` for the latest, or None for the pin of the key's consumer."""

_CHUNK = 10_000
_ATTEMPTS = 4
_RETRIES = 3  # of a read that is told to come again
_LONGEST_PAUSE_S = 10.0  # that it waits for that; what is told to wait for longer is raised
_SPREAD = 0.25  # of a pause: those who were refused together shall not come back together
_PROBLEM = "application/problem+json"
_PROBLEM_TYPE = "urn:backcast:problem:"
_PROBLEM_MEMBERS = {"type", "title", "status", "detail", "instance"}
_EXPECT_SNAPSHOT = "Backcast-Expect-Snapshot"
_RAW = "application/octet-stream"
_ARROW = "application/vnd.apache.arrow.stream"
_KEY = re.compile("[!-~]+")  # a header takes no more of what a file or a variable may hold


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors of one version, all made from one snapshot, in the order of ``ids``.

    Attributes:
        ids: N ids, as asked for.
        vectors: (N, D_j) float32; rows of missing ids are NaN.
        found: (N,) bool.
        missing: the ids without a vector, each once, as first seen.
        version: j, the version that the vectors are compatible with.
        live_version: k, the version whose stored vectors they were made from.
        snapshot: S.d, the snapshot and delta that they were made from.
        drift: (N,) float32, where it was asked for: each vector's drift bound, the most by which
            it can be away from the one that version j itself stored last; NaN where there is none.
    """

    ids: tuple[str, ...]
    vectors: NDArray[np.float32]
    found: NDArray[np.bool_]
    version: int
    live_version: int
    snapshot: str
    drift: NDArray[np.float32] | None = None

    @property
    def dim(self) -> int:
        """D_j, the length of each vector."""
        return int(self.vectors.shape[1])

    @property
    def missing(self) -> tuple[str, ...]:
        """The ids without a vector, each once, as first seen."""
        return tuple(dict.fromkeys(self.ids[at] for at in np.flatnonzero(~self.found).tolist()))


@dataclass(frozen=True)
class VersionInfo:
    """One registered version, as the service describes it."""

    number: int
    state: VersionState
    dim: int
    parent: int | None
    method: str
    until: int
    created_at: datetime
    servable: bool
    deprecated_at: datetime | None
    sunset_at: datetime | None
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class _Call:
    """One request, as httpx takes it."""

    method: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: bool = True


_Result = TypeVar("_Result")
_Steps = Generator[_Call, httpx2.Response, _Result]
"""Requests to send one after another, each to be answered with its response or error."""


class _Reader:
    """What is asked and how answers are read; how it is sent is for the two clients to say."""

    def __init__(self, url: str | None, key: str | None) -> None:
        settings = Settings.load()
        self.url = (url or settings.url).rstrip("/")
        secret = _checked_key(key or (settings.key.get_secret_value() if settings.key else ""))
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._chunk = _CHUNK

    def _one(
        self, id: str, version: VersionName, entity: Entity | str, snapshot: str | None
    ) -> _Steps[NDArray[np.float32]]:
        response = yield _Call(
            "GET",
            f"/embeddings/{_segment(id)}",
            {
                "params": {
                    "entity": str(entity),
                    **({} if version is None else {"version": version}),
                },
                "headers": {"Accept": _RAW, **_expecting(snapshot)},
            },
        )
        _demand_version(response, version)
        _demand_snapshot(response, snapshot)
        return _read_raw(response)

    def _many(
        self,
        ids: Sequence[str],
        version: VersionName,
        asked: Mapping[str, Any],
        snapshot: str | None,
    ) -> _Steps[Embeddings]:
        """Ask for all ids; ``asked`` is what each request says beside ids and version."""
        _demand_list(ids)
        for _ in range(_ATTEMPTS - 1):
            try:
                return (yield from self._all_batches(ids, version, asked, snapshot))
            except SnapshotMismatch:
                if snapshot is not None:  # another one is not what was asked for
                    raise
        return (yield from self._all_batches(ids, version, asked, snapshot))

    def _all_batches(
        self,
        ids: Sequence[str],
        version: VersionName,
        asked: Mapping[str, Any],
        snapshot: str | None,
    ) -> _Steps[Embeddings]:
        batches: list[Embeddings] = []
        done = 0
        while not batches or done < len(ids):
            expected = batches[0].snapshot if batches else snapshot
            piece = ids[done : done + self._chunk]
            try:
                batch = yield from self._batch(piece, version, asked, expected)
            except BatchTooLarge as error:
                self._chunk = _smaller(self._chunk, error)
                continue
            batches.append(batch)
            version = batch.version  # a pin that moves meanwhile must not change it half-way
            done += len(batch.ids)
        return _joined(batches)

    def _batch(
        self,
        ids: Sequence[str],
        version: VersionName,
        asked: Mapping[str, Any],
        snapshot: str | None,
    ) -> _Steps[Embeddings]:
        response = yield _Call(
            "POST",
            "/embeddings/batch",
            {
                "content": _dumps({"ids": list(ids), "version": version, **asked}),
                "headers": {
                    "Accept": _ARROW,
                    "Content-Type": "application/json",
                    **_expecting(snapshot),
                },
            },
        )
        _demand_version(response, version)
        _demand_snapshot(response, snapshot)
        vectors, found, drift = _read_arrow(response, len(ids), drift=asked["drift"])
        return Embeddings(
            tuple(ids),
            vectors,
            found,
            _number(response, "Backcast-Version"),
            _number(response, "Backcast-Live-Version"),
            _header(response, "Backcast-Snapshot"),
            drift,
        )

    def _versions(self) -> _Steps[list[VersionInfo]]:
        response = yield _Call("GET", "/versions")
        return [_version_info(version) for version in response.json()["versions"]]

    def _promotion(
        self, version: int, expected_live: int | None, force: bool, reason: str | None
    ) -> _Steps[dict[str, Any]]:
        order = {"expected_live": expected_live, "force": force, "reason": reason}
        path = f"/admin/versions/{version}/promote"
        response = yield _Call("POST", path, {"json": order}, reads=False)
        operation: dict[str, Any] = response.json()
        return operation

    def _operation(self, id: str) -> _Steps[dict[str, Any]]:
        response = yield _Call("GET", f"/admin/operations/{_segment(id)}")
        operation: dict[str, Any] = response.json()
        return operation

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise ServiceError(
                f"{self.url} does not answer ({type(error).__name__}: {redact(str(error))}). "
                "Is the service running (backcast serve), and is BACKCAST_URL right?",
                url=self.url,
            ) from error
        except httpx2.InvalidURL as error:
            raise ConfigError(f"BACKCAST_URL={self.url!r}: {error}.") from error


class Client(_Reader):
    """A connection to the service; close it, or use it as a context manager.

    Args:
        url: where the service answers; by default BACKCAST_URL.
        key: the bearer key; by default BACKCAST_KEY, and none where that is not set. Blanks and
            line breaks around it, such as a file ends with, are left out.
        timeout: seconds for connecting, and for each wait for the next bytes.

    Raises:
        ConfigError: ``url`` is none, or ``key`` cannot be one.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout: float = 10.0
    ) -> None:
        super().__init__(url, key)
        with self._translated():
            self._http = httpx2.Client(base_url=self.url, headers=self._headers, timeout=timeout)

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def get(
        self,
        id: str,
        version: VersionName = None,
        entity: Entity | str = Entity.ITEM,
        *,
        snapshot: str | None = None,
    ) -> NDArray[np.float32]:
        """Return the vector of one id: (D_j,) float32.

        ``snapshot`` demands the one that it must be made from, see ``get_many``.

        Raises:
            UnknownId: there is no vector of this id.
            UnknownVersion, VersionNotPromoted, VersionOffChain, VersionRetired: why version j
                cannot be had; nothing is ever put in its place.
            SnapshotMismatch: the snapshot demanded is not served (any more).
            VersionRequired: ``version`` is None and the consumer has no pin.
            Unauthorized, Forbidden, ServiceError: the service does not let us in, or not answer.
        """
        return self._run(self._one(id, version, entity, snapshot))

    def get_many(
        self,
        ids: Sequence[str],
        version: VersionName = None,
        entity: Entity | str = Entity.ITEM,
        *,
        snapshot: str | None = None,
        drift: bool = False,
    ) -> Embeddings:
        """Return the vectors of many ids, all from one snapshot; order and duplicates kept.

        More ids than the service takes at once are asked for in several batches. Where another
        snapshot goes live between two of them, all are asked for again.

        To read more than one call's ids from one snapshot, give the ``snapshot`` of the first
        answer (S.d) to all that follow: they are made from the same, or refused, never a mixture.

        With ``drift`` the answer has each vector's drift bound, too.

        Raises:
            SnapshotMismatch: the snapshot demanded is not served (any more); without a demand,
                another one went live during each of a few attempts.
            UnknownVersion, VersionNotPromoted, VersionOffChain, VersionRetired: see ``get``.
            InvalidInput: an id cannot be one, or ``ids`` is a single string.
            VersionRequired, Unauthorized, Forbidden, ServiceError: see ``get``.
        """
        asked = {"entity": str(entity), "drift": drift}
        return self._run(self._many(ids, version, asked, snapshot))

    def versions(self) -> list[VersionInfo]:
        """Return every registered version, oldest first."""
        return self._run(self._versions())

    def promote(
        self,
        version: int,
        expected_live: int | None,
        *,
        force: bool = False,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """Start to make ``version`` live and return the operation; needs an admin key.

        Args:
            version: the version to make live.
            expected_live: the version that the caller saw live, None for none.
            force: promote although the live version would leave the chain.
            reason: why; a forced promotion needs one.

        Raises:
            PromotionConflict: another version is live.
            UnknownVersion, VersionRetired, NothingPublished: there is nothing to promote.
        """
        return self._run(self._promotion(version, expected_live, force, reason))

    def operation(self, id: str) -> dict[str, Any]:
        """Return an operation, while it runs and afterwards; needs an admin key."""
        return self._run(self._operation(id))

    def _run(self, steps: _Steps[_Result]) -> _Result:
        try:
            call = next(steps)
            while True:
                try:
                    response = self._send(call)
                except BackcastError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(response)
        except StopIteration as ended:
            result: _Result = ended.value
            return result

    def _send(self, call: _Call) -> httpx2.Response:
        for attempt in itertools.count():
            with self._translated():
                response = self._http.request(call.method, call.path, **call.options)
            pause = _pause(call, response, attempt)
            if pause is None:
                break
            time.sleep(pause)
        return _accepted(response)


class AsyncClient(_Reader):
    """The same for an event loop; every method is that of :class:`Client`, to be awaited.

    async with AsyncClient("https://embeddings.example", key) as client:
        vector = await client.get("B00005N7P0", version=1)
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout: float = 10.0
    ) -> None:
        super().__init__(url, key)
        with self._translated():
            self._http = httpx2.AsyncClient(
                base_url=self.url, headers=self._headers, timeout=timeout
            )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def get(
        self,
        id: str,
        version: VersionName = None,
        entity: Entity | str = Entity.ITEM,
        *,
        snapshot: str | None = None,
    ) -> NDArray[np.float32]:
        """Return the vector of one id: (D_j,) float32; see ``Client.get``."""
        return await self._run(self._one(id, version, entity, snapshot))

    async def get_many(
        self,
        ids: Sequence[str],
        version: VersionName = None,
        entity: Entity | str = Entity.ITEM,
        *,
        snapshot: str | None = None,
        drift: bool = False,
    ) -> Embeddings:
        """Return the vectors of many ids, all from one snapshot; see ``Client.get_many``."""
        asked = {"entity": str(entity), "drift": drift}
        return await self._run(self._many(ids, version, asked, snapshot))

    async def versions(self) -> list[VersionInfo]:
        """Return every registered version, oldest first."""
        return await self._run(self._versions())

    async def promote(
        self,
        version: int,
        expected_live: int | None,
        *,
        force: bool = False,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """Start to make ``version`` live and return the operation; see ``Client.promote``."""
        return await self._run(self._promotion(version, expected_live, force, reason))

    async def operation(self, id: str) -> dict[str, Any]:
        """Return an operation, while it runs and afterwards; needs an admin key."""
        return await self._run(self._operation(id))

    async def _run(self, steps: _Steps[_Result]) -> _Result:
        try:
            call = next(steps)
            while True:
                try:
                    response = await self._send(call)
                except BackcastError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(response)
        except StopIteration as ended:
            result: _Result = ended.value
            return result

    async def _send(self, call: _Call) -> httpx2.Response:
        for attempt in itertools.count():
            with self._translated():
                response = await self._http.request(call.method, call.path, **call.options)
            pause = _pause(call, response, attempt)
            if pause is None:
                break
            await asyncio.sleep(pause)
        return _accepted(response)


def _checked_key(key: str) -> str:
    key = key.strip()
    if key and _KEY.fullmatch(key) is None:
        raise ConfigError(
            "The key has a character that no key has; a line break or a blank within it, perhaps. "
            "Give it, or BACKCAST_KEY, as `backcast keys create` printed it."
        )
    return key


def _demand_list(ids: Sequence[str]) -> None:
    if isinstance(ids, str | bytes):  # whose characters would be asked for
        raise InvalidInput(f"The ids are one {type(ids).__name__}, {ids!r:.80}; give a list.")


def _pause(call: _Call, response: httpx2.Response, attempt: int) -> float | None:
    """Return the seconds to wait before the call is made again, None where it is not."""
    after = response.headers.get("Retry-After", "")
    refused = response.status_code in {429, 503} and after.isdecimal()
    if not refused or not call.reads or attempt >= _RETRIES or int(after) > _LONGEST_PAUSE_S:
        return None
    return int(after) * random.uniform(1, 1 + _SPREAD)


def _accepted(response: httpx2.Response) -> httpx2.Response:
    if not response.is_success:
        raise _error(response)
    return response


def _expecting(snapshot: str | None) -> dict[str, str]:
    return {} if snapshot is None else {_EXPECT_SNAPSHOT: snapshot}


def _segment(text: str) -> str:
    # A path segment of nothing but dots would be resolved, and lost, on its way.
    return quote(check_id(text), safe="").replace(".", "%2E")


def _dumps(document: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError as error:
        raise InvalidInput(f"The ids cannot be sent: {error}.") from error


def _read_raw(response: httpx2.Response) -> NDArray[np.float32]:
    dim = _number(response, "Backcast-Dim")
    _demand(len(response.content) == 4 * dim, response, f"no {dim} float32 numbers")
    return np.frombuffer(response.content, "<f4").astype(np.float32)


def _read_arrow(
    response: httpx2.Response, count: int, *, drift: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32] | None]:
    expected = (count, _number(response, "Backcast-Dim"))
    try:
        with pa.ipc.open_stream(response.content) as stream:
            rows = stream.read_next_batch()
        column, bounds = rows.column("vector"), None
        vectors = column.values.to_numpy().reshape(-1, column.type.list_size).copy()
        if drift:  # what is null becomes NaN
            bounds = rows.column("drift_bound").to_numpy(zero_copy_only=False).copy()
    except (pa.ArrowException, KeyError, AttributeError) as error:
        raise _unreadable(response, f"no vectors ({error})") from error
    _demand(vectors.shape == expected, response, f"vectors of shape {vectors.shape}")
    found = column.is_valid().to_numpy(zero_copy_only=False)
    vectors[~found] = np.nan
    return vectors, found, bounds


def _joined(batches: Sequence[Embeddings]) -> Embeddings:
    first = batches[0]
    if len(batches) == 1:
        return first
    drifts = [batch.drift for batch in batches if batch.drift is not None]
    return Embeddings(
        tuple(id for batch in batches for id in batch.ids),
        np.concatenate([batch.vectors for batch in batches]),
        np.concatenate([batch.found for batch in batches]),
        first.version,
        first.live_version,
        first.snapshot,
        None if not drifts else np.concatenate(drifts),
    )


def _smaller(chunk: int, error: BatchTooLarge) -> int:
    limit = error.data.get("limit")
    if not isinstance(limit, int) or not 0 < limit < chunk:
        raise error
    return limit


def _version_info(document: Mapping[str, Any]) -> VersionInfo:
    def moment(name: str) -> datetime | None:
        return datetime.fromisoformat(document[name]) if document[name] else None

    known = {field.name: document[field.name] for field in fields(VersionInfo)}
    moments = {name: moment(name) for name in ("created_at", "deprecated_at", "sunset_at")}
    return VersionInfo(**{**known, **moments, "state": VersionState(document["state"])})


def _header(response: httpx2.Response, name: str) -> str:
    _demand(name in response.headers, response, f"without {name}")
    return response.headers[name]


def _number(response: httpx2.Response, header: str) -> int:
    text = _header(response, header)
    _demand(text.isdecimal(), response, f"{header} {text!r}")
    return int(text)


def _demand_version(response: httpx2.Response, version: VersionName) -> None:
    answered = _number(response, "Backcast-Version")
    _demand(not isinstance(version, int) or answered == version, response, f"version {answered}")


def _demand_snapshot(response: httpx2.Response, snapshot: str | None) -> None:
    answered = _header(response, "Backcast-Snapshot")
    known = snapshot in {None, answered, answered.rpartition(".")[0]}
    _demand(known, response, f"from snapshot {answered}")


def _demand(condition: bool, response: httpx2.Response, found: str) -> None:
    if not condition:
        raise _unreadable(response, found)


def _unreadable(response: httpx2.Response, found: str) -> ServiceError:
    return ServiceError(
        f"{response.url} answered {found}; Backcast would not. Is BACKCAST_URL right?",
        url=str(response.url),
    )


def _error(response: httpx2.Response) -> BackcastError:
    """Return the error that a problem document describes."""
    if response.headers.get("content-type", "").partition(";")[0] != _PROBLEM:
        return _unreadable(response, f"{response.status_code} {response.reason_phrase}")
    problem = response.json()
    known = BackcastError.by_code(problem["type"].removeprefix(_PROBLEM_TYPE))
    if known is None:
        return ServiceError(f"{problem['title']}: {problem['detail']}", status=problem["status"])
    data = {name: value for name, value in problem.items() if name not in _PROBLEM_MEMBERS}
    return known.rebuild(problem["detail"], data)
