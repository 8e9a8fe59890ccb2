"""What nobody needs any more is deleted, and shown before, if anybody asks.

Superseded snapshots go after their grace period, with their changes and drift bounds; then, by
policy, the weights of models that nothing can be trained on. Maps never go. What the store holds
for no good reason goes while nothing else can be loading it: under the slot of operations.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from backcast.artifacts import FOLDER
from backcast.drift import bounded_snapshot
from backcast.errors import ArtifactError, BackcastError, OperationRunning, StoreError
from backcast.lifecycle.operations import alone
from backcast.lifecycle.places import Backcast
from backcast.settings import Settings
from backcast.versions import Claim, SnapshotRecord, Version, VersionState

WEIGHTS = "model.safetensors"
"""The file of a version that the policy may delete; every other is kept."""

_COLLECT = "collect"
_DAY = timedelta(days=1)
_OUT_OF_USE = {
    VersionState.SUPERSEDED,
    VersionState.ROLLED_BACK,
    VersionState.REJECTED,
    VersionState.RETIRED,
}


@dataclass(frozen=True)
class Policy:
    """What is kept.

    Attributes:
        grace: how long a superseded snapshot can go live again.
        keep_models: ``all``, or ``fit``: weights of models that can be served or trained on.
        timeout: seconds without a sign of life after which an operation counts as abandoned.
    """

    grace: timedelta
    keep_models: str = "all"
    timeout: float = 15.0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read the policy off the settings."""
        grace = timedelta(seconds=settings.grace_seconds)
        return cls(grace, settings.keep_models, settings.operation_timeout)


@dataclass(frozen=True)
class Doomed:
    """One thing that is deleted.

    Attributes:
        what: "snapshot" (with its changes and drift bounds), "stored" (held by the store alone),
            "weights" or "folder".
        name: of the snapshot, the version's file, or the folder.
        reason: why nobody needs it.
        bytes: what it takes in artifacts and store; None where that is not known.
    """

    what: str
    name: str
    reason: str
    bytes: int | None


def sweep(backcast: Backcast, grace: timedelta) -> list[str]:
    """Delete snapshots superseded longer than ``grace`` ago from store and artifacts.

    Returns their ids. They are condemned first and noted as deleted last, so that a kill half-way
    is finished by the next call, and no transaction is open while files are deleted. Their changes
    and drift bounds go with them.

    Raises:
        ArtifactError, StoreError: that of the first snapshot that cannot be deleted, which it
            names; all others are.
    """
    with _Tries() as tries:
        return [one.name for one in _delete_snapshots(backcast, grace, tries)]


def plan_collection(backcast: Backcast, policy: Policy) -> list[Doomed]:
    """List what ``collect`` would delete now, and delete nothing."""
    due = backcast.registry.snapshots.due(backcast.registry.now() - policy.grace)
    return [
        *(_doomed_snapshot(backcast, snapshot) for snapshot in due),
        *(_doomed_weights(version) for version in _unfit_models(backcast, policy)),
        *(_doomed_stored(backcast, name) for name in _unneeded(backcast)),
    ]


def collect(backcast: Backcast, policy: Policy, actor: str) -> list[Doomed]:
    """Delete what nobody needs, and return what was deleted.

    Raises:
        OperationRunning: an operation may be loading what the store seems to hold for nothing;
            all the rest is deleted.
        ArtifactError, StoreError: that of the first thing that cannot be deleted, which it names;
            all others are.
    """
    with _Tries() as tries:
        deleted = _delete_snapshots(backcast, policy.grace, tries)
        deleted += _delete_weights(backcast, policy, tries)
        if _unneeded(backcast):
            with _alone(backcast, policy, actor):
                deleted += _delete_stored(backcast, _unneeded(backcast), tries)
        return deleted


def plan_litter(backcast: Backcast) -> list[Doomed]:
    """List what no row of the registry names: folders older than a day, and stored snapshots.

    A folder's age is told by its file system alone: by the times of its files and of a new one.
    """
    folders = [
        Doomed("folder", found.name, "no row names it, and it is older than a day", found.size)
        for found in _nameless(backcast)
    ]
    stored = [
        Doomed(
            "stored", name, "this registry knows no snapshot of this name", _held(backcast, name)
        )
        for name in _strange(backcast)
    ]
    return [*folders, *stored]


def collect_litter(backcast: Backcast, policy: Policy, actor: str) -> list[Doomed]:
    """Delete what ``plan_litter`` lists, and return what was deleted.

    Every snapshot in the store is taken for this registry's: never share a Redis database between
    registries and call this.

    Raises:
        OperationRunning: an operation may need it; nothing was deleted.
        ArtifactError, StoreError: that of the first thing that cannot be deleted, which it names;
            all others are.
    """
    deleted = []
    with _Tries() as tries, _alone(backcast, policy, actor):
        for one in plan_litter(backcast):
            with tries.each(one.name):
                if one.what == "folder":
                    backcast.artifacts.delete(one.name)
                else:
                    backcast.store.drop(one.name)
                deleted.append(one)
    return deleted


class _Tries:
    """Lets one thing after another be deleted whatever becomes of each before it.

    When the block ends, the first error is raised, and says what could not be deleted.
    """

    def __init__(self) -> None:
        self._first: BackcastError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None and self._first is not None:
            raise self._first

    @contextmanager
    def each(self, name: str) -> Iterator[None]:
        """Delete one thing in the block, which an error ends."""
        try:
            yield
        except (ArtifactError, StoreError) as error:
            if self._first is None:
                told = f"{name} is not deleted: {error.message}"
                self._first = type(error).rebuild(told, error.data)
                self._first.__cause__ = error


class Collector:
    """Collects in the background: nothing that it has not seen to be unneeded for long.

    What is superseded goes at every call, the rest is looked at now and then. How long this has
    seen something is told by its own monotonic clock.
    """

    LOOK_SECONDS, PATIENCE_SECONDS = 60.0, 600.0

    def __init__(
        self, backcast: Backcast, policy: Policy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backcast, self._policy, self._clock = backcast, policy, clock
        self._looked_at: float | None = None
        self._seen: dict[str, float] = {}

    def collect(self) -> None:
        """Delete what is due.

        Raises:
            ArtifactError, StoreError: that of the first thing that cannot be deleted, which it
                names; all others are.
        """
        with _Tries() as tries:
            _delete_snapshots(self._backcast, self._policy.grace, tries)
            now = self._clock()
            if self._looked_at is None or now - self._looked_at >= self.LOOK_SECONDS:
                self._looked_at = now
                _delete_weights(self._backcast, self._policy, tries)
                self._drop_stored(now, tries)

    def _drop_stored(self, now: float, tries: _Tries) -> None:
        unneeded = _unneeded(self._backcast)
        self._seen = {name: self._seen.get(name, now) for name in unneeded}
        patience = max(self.PATIENCE_SECONDS, self._policy.grace.total_seconds())
        if not any(now - since >= patience for since in self._seen.values()):
            return
        try:
            with _alone(self._backcast, self._policy, "service"):
                again = _unneeded(self._backcast)
                due = [name for name in again if now - self._seen.get(name, now) >= patience]
                _delete_stored(self._backcast, due, tries)
        except OperationRunning:
            return  # the next look may find nobody at work


def _alone(backcast: Backcast, policy: Policy, actor: str) -> AbstractContextManager[Claim]:
    return alone(backcast, _COLLECT, "delete", actor, policy.timeout)


# --- snapshots ------------------------------------------------------------------------------------


def _delete_snapshots(backcast: Backcast, grace: timedelta, tries: _Tries) -> list[Doomed]:
    deleted = []
    for snapshot in backcast.registry.snapshots.condemn(backcast.registry.now() - grace):
        with tries.each(f"Snapshot {snapshot.id}"):
            doomed = _doomed_snapshot(backcast, snapshot)
            _delete_snapshot(backcast, snapshot)
            deleted.append(doomed)
    return deleted


def _delete_snapshot(backcast: Backcast, snapshot: SnapshotRecord) -> None:
    drift = backcast.registry.drifts.of(snapshot.id)
    if drift is not None:
        _drop_drift(backcast, drift.id)
    backcast.store.drop(snapshot.id)
    for folder in _delta_folders(backcast, snapshot.id):
        backcast.artifacts.delete(folder)
    backcast.artifacts.delete(snapshot.folder)
    backcast.registry.snapshots.mark_deleted(snapshot.id)
    for folder in _delta_folders(backcast, snapshot.id):  # of an erasure that came meanwhile
        backcast.artifacts.delete(folder)


def _doomed_snapshot(backcast: Backcast, snapshot: SnapshotRecord) -> Doomed:
    folders = [snapshot.folder, *_delta_folders(backcast, snapshot.id)]
    size = sum(backcast.artifacts.size(folder) for folder in folders)
    since = snapshot.superseded_at
    reason = f"superseded {since:%Y-%m-%d %H:%M:%S} UTC" if since else "condemned"
    return Doomed("snapshot", snapshot.id, reason, size + (_held(backcast, snapshot.id) or 0))


def _delta_folders(backcast: Backcast, snapshot: str) -> list[str]:
    deltas = backcast.registry.deltas.of(snapshot)
    return list(dict.fromkeys(delta.file.rpartition("/")[0] for delta in deltas))


def _held(backcast: Backcast, name: str) -> int | None:
    try:
        return backcast.store.open(name).size
    except StoreError:
        return None


# --- what the store holds -------------------------------------------------------------------------


def _unneeded(backcast: Backcast) -> list[str]:
    """Return what the store holds of this registry's though it cannot be served or gone back to.

    A promotion that lost its compare-and-swap leaves such, and one that was killed. Half of a
    snapshot is listed only while no operation can be loading the other half; one that is under way
    may need all the rest.
    """
    rows = backcast.registry.snapshots.everything()
    needed = {row.id for row in rows if row.condemned_at is None and row.superseded_at is not None}
    live = backcast.registry.deployments.live()
    if live is not None:
        needed.add(live.snapshot)
    drifts = [backcast.registry.drifts.of(id) for id in needed]
    needed |= {drift.id for drift in drifts if drift is not None}
    known = {row.id for row in rows}
    return [
        name for name in _stored(backcast) if name not in needed and bounded_snapshot(name) in known
    ]


def _doomed_stored(backcast: Backcast, name: str) -> Doomed:
    reason = "in the store, and not live nor in its grace"
    if bounded_snapshot(name) != name:
        reason = "drift bounds in the store, of nothing that is live or in its grace"
    return Doomed("stored", name, reason, _held(backcast, name))


def _delete_stored(backcast: Backcast, names: Sequence[str], tries: _Tries) -> list[Doomed]:
    deleted = []
    for name in names:
        with tries.each(f"Snapshot {name}, in the store alone,"):
            doomed = _doomed_stored(backcast, name)
            _drop_stored(backcast, name)
            deleted.append(doomed)
    return deleted


def _drop_stored(backcast: Backcast, name: str) -> None:
    if bounded_snapshot(name) != name:
        _drop_drift(backcast, name)
    else:
        backcast.store.drop(name)


def _drop_drift(backcast: Backcast, name: str) -> None:
    backcast.store.drop(name)
    backcast.artifacts.delete(f"drifts/{name}")


def _strange(backcast: Backcast) -> list[str]:
    known = {row.id for row in backcast.registry.snapshots.everything()}
    return [name for name in _stored(backcast) if bounded_snapshot(name) not in known]


def _stored(backcast: Backcast) -> list[str]:
    held, active = backcast.store.snapshots(), backcast.registry.operations.active()
    loading = active is not None and active.kind != _COLLECT
    return held if loading else sorted({*held, *backcast.store.remains()})


# --- weights --------------------------------------------------------------------------------------


def _unfit_models(backcast: Backcast, policy: Policy) -> list[Version]:
    """Return the versions whose weights the policy gives up: nothing can be trained on them.

    A version keeps them as long as one of its snapshots can be promoted or gone back to.
    """
    if policy.keep_models == "all":
        return []
    versions = backcast.registry.versions.all()
    kept = backcast.registry.snapshots.undeleted()
    usable = {row.version for row in kept if row.condemned_at is None}
    return [
        version
        for version in versions
        if version.state in _OUT_OF_USE
        and version.number not in usable
        and WEIGHTS in version.files
        and backcast.artifacts.exists(version.folder, WEIGHTS)
    ]


def _doomed_weights(version: Version) -> Doomed:
    name = f"{version.folder}/{WEIGHTS}"
    reason = f"version {version.number} is {version.state}, BACKCAST_KEEP_MODELS=fit"
    return Doomed("weights", name, reason, version.files[WEIGHTS].size)


def _delete_weights(backcast: Backcast, policy: Policy, tries: _Tries) -> list[Doomed]:
    deleted = []
    with tries.each("The weights of a version"):  # whether they are there cannot be told
        for version in _unfit_models(backcast, policy):
            doomed = _doomed_weights(version)
            with tries.each(doomed.name):
                backcast.registry.versions.note_weights_deleted(version.number)
                backcast.artifacts.delete_file(version.folder, WEIGHTS)
                deleted.append(doomed)
    return deleted


# --- litter ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nameless:
    name: str
    size: int


def _nameless(backcast: Backcast) -> list[_Nameless]:
    named = backcast.registry.named_folders()
    folders = backcast.artifacts.folders()
    strangers = {f: found for f, found in folders.items() if FOLDER.fullmatch(f)}
    strangers = {f: found for f, found in strangers.items() if f not in named}
    if not strangers:
        return []
    now = backcast.artifacts.now()
    return [
        _Nameless(folder, found.size)
        for folder, found in sorted(strangers.items())
        if now - found.changed_at > _DAY
    ]
