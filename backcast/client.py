"""The HTTP client: vectors of the version that a model was trained on, as float32 arrays.

    with Client("https://embeddings.example", key) as client:
        vector = client.get("B00005N7P0", version=1)            # (D_1,) float32
        batch = client.get_many(ids, version=1)                 # batch.vectors: (N, D_1) float32

What the service refuses is raised as the class of ``backcast.errors`` that the service raised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self
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
from backcast.settings import Settings
from backcast.vectors import check_id
from backcast.versions import Entity, VersionState

__all__ = ["Client", "Embeddings", "VersionInfo", "VersionName"]

VersionName = int | Literal["live"] | None
"""A version's number, ``"live"`` for the latest, or None for the pin of the key's consumer."""

_CHUNK = 10_000
_ATTEMPTS = 4
_PROBLEM = "application/problem+json"
_PROBLEM_TYPE = "urn:backcast:problem:"
_PROBLEM_MEMBERS = {"type", "title", "status", "detail", "instance"}
_RAW = "application/octet-stream"
_ARROW = "application/vnd.apache.arrow.stream"


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
    """

    ids: tuple[str, ...]
    vectors: NDArray[np.float32]
    found: NDArray[np.bool_]
    version: int
    live_version: int
    snapshot: str

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


class Client:
    """A connection to the service; close it, or use it as a context manager.

    Args:
        url: where the service answers; by default BACKCAST_URL.
        key: the bearer key; by default BACKCAST_KEY, and none where that is not set.
        timeout: seconds for connecting, and for each wait for the next bytes.

    Raises:
        ConfigError: ``url`` is none.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout: float = 10.0
    ) -> None:
        settings = Settings.load()
        self.url = (url or settings.url).rstrip("/")
        secret = key or (settings.key.get_secret_value() if settings.key else None)
        try:
            self._http = httpx2.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {secret}"} if secret else {},
                timeout=timeout,
            )
        except httpx2.InvalidURL as error:
            raise ConfigError(f"BACKCAST_URL={self.url!r}: {error}.") from error
        self._chunk = _CHUNK

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
        self, id: str, version: VersionName = None, entity: Entity | str = Entity.ITEM
    ) -> NDArray[np.float32]:
        """Return the vector of one id: (D_j,) float32.

        Raises:
            UnknownId: there is no vector of this id.
            UnknownVersion, VersionNotPromoted, VersionOffChain, VersionRetired: why version j
                cannot be had; nothing is ever put in its place.
            VersionRequired: ``version`` is None and the consumer has no pin.
            Unauthorized, Forbidden, ServiceError: the service does not let us in, or not answer.
        """
        response = self._request(
            "GET",
            f"/embeddings/{_segment(id)}",
            params={"entity": str(entity), **({} if version is None else {"version": version})},
            headers={"Accept": _RAW},
        )
        _demand_version(response, version)
        return _read_raw(response)

    def get_many(
        self, ids: Sequence[str], version: VersionName = None, entity: Entity | str = Entity.ITEM
    ) -> Embeddings:
        """Return the vectors of many ids, all from one snapshot; order and duplicates kept.

        More ids than the service takes at once are asked for in several batches. Where another
        snapshot goes live between two of them, all are asked for again.

        Raises:
            SnapshotMismatch: another snapshot went live during each of a few attempts.
            UnknownVersion, VersionNotPromoted, VersionOffChain, VersionRetired: see ``get``.
            InvalidInput: an id cannot be one.
            VersionRequired, Unauthorized, Forbidden, ServiceError: see ``get``.
        """
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._read_all(ids, version, entity)
            except SnapshotMismatch:
                continue
        return self._read_all(ids, version, entity)

    def versions(self) -> list[VersionInfo]:
        """Return every registered version, oldest first."""
        document = self._request("GET", "/versions").json()
        return [_version_info(version) for version in document["versions"]]

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
        order = {"expected_live": expected_live, "force": force, "reason": reason}
        path = f"/admin/versions/{version}/promote"
        operation: dict[str, Any] = self._request("POST", path, json=order).json()
        return operation

    def operation(self, id: str) -> dict[str, Any]:
        """Return an operation, while it runs and afterwards; needs an admin key."""
        path = f"/admin/operations/{_segment(id)}"
        operation: dict[str, Any] = self._request("GET", path).json()
        return operation

    def _read_all(
        self, ids: Sequence[str], version: VersionName, entity: Entity | str
    ) -> Embeddings:
        batches: list[Embeddings] = []
        done = 0
        while not batches or done < len(ids):
            snapshot = batches[0].snapshot if batches else None
            try:
                batch = self._read(ids[done : done + self._chunk], version, entity, snapshot)
            except BatchTooLarge as error:
                self._chunk = _smaller(self._chunk, error)
                continue
            batches.append(batch)
            version = batch.version  # a pin that moves meanwhile must not change it half-way
            done += len(batch.ids)
        return _joined(batches)

    def _read(
        self,
        ids: Sequence[str],
        version: VersionName,
        entity: Entity | str,
        snapshot: str | None,
    ) -> Embeddings:
        response = self._request(
            "POST",
            "/embeddings/batch",
            content=_dumps({"ids": list(ids), "version": version, "entity": str(entity)}),
            headers={
                "Accept": _ARROW,
                "Content-Type": "application/json",
                **({} if snapshot is None else {"Backcast-Expect-Snapshot": snapshot}),
            },
        )
        _demand_version(response, version)
        vectors, found = _read_arrow(response, len(ids))
        return Embeddings(
            tuple(ids),
            vectors,
            found,
            _number(response, "Backcast-Version"),
            _number(response, "Backcast-Live-Version"),
            _header(response, "Backcast-Snapshot"),
        )

    def _request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx2.TransportError as error:
            raise ServiceError(
                f"{self.url} does not answer ({type(error).__name__}: {error}). "
                "Is the service running (backcast serve), and is BACKCAST_URL right?",
                url=self.url,
            ) from error
        if not response.is_success:
            raise _error(response)
        return response


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
    response: httpx2.Response, count: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    expected = (count, _number(response, "Backcast-Dim"))
    try:
        with pa.ipc.open_stream(response.content) as stream:
            column = stream.read_next_batch().column("vector")
        vectors = column.values.to_numpy().reshape(-1, column.type.list_size).copy()
    except (pa.ArrowException, KeyError, AttributeError) as error:
        raise _unreadable(response, f"no vectors ({error})") from error
    _demand(vectors.shape == expected, response, f"vectors of shape {vectors.shape}")
    found = column.is_valid().to_numpy(zero_copy_only=False)
    vectors[~found] = np.nan
    return vectors, found


def _joined(batches: Sequence[Embeddings]) -> Embeddings:
    first = batches[0]
    if len(batches) == 1:
        return first
    return Embeddings(
        tuple(id for batch in batches for id in batch.ids),
        np.concatenate([batch.vectors for batch in batches]),
        np.concatenate([batch.found for batch in batches]),
        first.version,
        first.live_version,
        first.snapshot,
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
