"""Operations under faults: nothing is lost, nothing runs twice, and the state says what happened.

Owners that die or sleep are processes; those that look after them are replicas in this one.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy import event, update

from backcast.acts import Act, Actor, ActRecord, Outcome
from backcast.artifacts import Artifacts, HashingFile
from backcast.cli import main
from backcast.drift import bounded_snapshot, open_bounds
from backcast.errors import (
    BackcastError,
    Conflict,
    OperationAbandoned,
    OperationCancelled,
    OperationRunning,
    PromotionConflict,
    RegistryError,
)
from backcast.lifecycle import (
    Backcast,
    Promote,
    Refresh,
    Rollback,
    open_backcast,
    run_order,
    upsert,
)
from backcast.lifecycle.operations import Watcher, begin, cancel, new_owner
from backcast.registry import OperationDraft, Operations, postgres, tables
from backcast.registry.snapshots import Snapshots
from backcast.settings import Settings
from backcast.snapshots import read_snapshot
from backcast.vectors import VectorBatch
from backcast.versions import Claim, Entity, Operation, OperationState
from benchmarks.soak_replicas import replica_environment
from service.engine import Engine
from service.operations import Operator
from tests.service_support import client_of
from tests.support import SPAWNER, Home, build_home, exit_codes

TIMEOUT = 1.0
WAIT_S = 30


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Version 0 is live, 1 and 2 are published."""
    with build_home(tmp_path, live=0, **backends, operation_timeout=TIMEOUT) as home:
        yield home


@contextmanager
def replica(home: Home, *, watching: bool = True) -> Iterator[Operator]:
    """A replica's part that runs operations, on connections of its own."""
    with open_backcast(home.settings) as backcast:
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        with Operator(backcast, engine, TIMEOUT) as operator:
            stop = threading.Event()

            def watch() -> None:
                while not stop.wait(TIMEOUT / 5):
                    try:
                        operator.watch()
                    except RegistryError:
                        continue

            thread = threading.Thread(target=watch)
            if watching:
                thread.start()
            try:
                yield operator
            finally:
                stop.set()
                if watching:
                    thread.join()


def ended(home: Home, id: str) -> Operation:
    deadline = time.monotonic() + WAIT_S
    while True:
        operation = home.backcast.registry.operations.get(id)
        if operation.finished_at is not None:
            return operation
        assert time.monotonic() < deadline, operation
        time.sleep(0.02)


def active(home: Home) -> Operation:
    operation = home.backcast.registry.operations.active()
    assert operation is not None
    return operation


def live_version(home: Home) -> int:
    live = home.backcast.registry.deployments.live()
    assert live is not None
    return live.version


def history(home: Home) -> list[tuple[str, int, str | None]]:
    rows = home.backcast.registry.deployments.history()
    return [(row["kind"], row["version"], row["operation"]) for row in rows]


# --- owners that die ------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(backcast: Backcast, sql: str) -> None:
    def watch(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(sql):
            die()

    event.listen(backcast.registry._engine, "after_cursor_execute", watch)


def die_in_load(backcast: Backcast) -> None:
    load = backcast.store.load

    def cut_short(batches: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
        for batch in batches:
            yield from batch.slices(3)
            die()

    type(backcast.store).load = lambda _, snapshot, dim, counts, batches, precision: load(  # type: ignore[assignment,method-assign,misc]
        snapshot, dim, counts, cut_short(batches), precision
    )


def die_in_load_of_bounds(backcast: Backcast) -> None:
    load = backcast.store.load

    def cut_short(batches: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
        for batch in batches:
            yield from batch.slices(3)
            die()

    def watched(_: Any, snapshot: str, dim: int, counts: Any, batches: Any, precision: Any) -> None:
        of_bounds = bounded_snapshot(snapshot) != snapshot
        load(snapshot, dim, counts, cut_short(batches) if of_bounds else batches, precision)

    type(backcast.store).load = watched  # type: ignore[assignment,method-assign]


def die_while_bounds_are_written(_: Backcast) -> None:
    create = Artifacts.create

    @contextmanager
    def cut_short(artifacts: Artifacts, folder: str, name: str) -> Iterator[HashingFile]:
        with create(artifacts, folder, name) as file:
            if folder.startswith("drifts/"):
                file.write(b"PAR1")
                die()
            yield file

    Artifacts.create = cut_short  # type: ignore[method-assign,assignment]


def die_at_step(backcast: Backcast, point: str) -> None:
    progress = backcast.registry.operations.progress

    def watched(claim: Claim, step: str, fraction: float) -> None:
        progress(claim, step, fraction)
        if step == point:
            die()

    backcast.registry.operations.progress = watched  # type: ignore[method-assign]


def die_before_end(backcast: Backcast) -> None:
    backcast.registry.operations.succeed = die  # type: ignore[method-assign]


KILLS: dict[str, Callable[[Backcast], None]] = {
    "check": lambda backcast: die_at_step(backcast, "check"),
    "in-bounds": die_while_bounds_are_written,
    "load": lambda backcast: die_at_step(backcast, "load"),
    "in-load": die_in_load,
    "in-load-of-bounds": die_in_load_of_bounds,
    "switch": lambda backcast: die_at_step(backcast, "switch"),
    "after-swap": lambda backcast: die_after(backcast, "UPDATE live"),
    "before-commit": lambda backcast: die_after(backcast, "INSERT INTO deployments"),
    "after-switch": die_before_end,
}
"""Where the process dies; only the last one has switched."""


PROMOTING = Act("promote", "version 1")


def act_of(home: Home) -> ActRecord:
    """Return the only act in the audit log."""
    [act] = home.backcast.registry.audit.recent(10)
    return act


def accept_and_die(settings: Settings, point: str) -> None:
    """Accept a promotion as a replica does, and die at a point of it."""
    with open_backcast(settings) as backcast:
        KILLS[point](backcast)
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        with Operator(backcast, engine, TIMEOUT) as operator:
            with backcast.registry.audit.recording(Actor("ann", "1a2b3c4d"), PROMOTING) as recorded:
                operator.start(Promote(1, 0), "ann", "morning", recorded.id)
            time.sleep(WAIT_S)


@pytest.mark.parametrize("point", KILLS)
def test_promotion_of_a_dead_replica_is_carried_on_by_another(home: Home, point: str) -> None:
    assert exit_codes(accept_and_die, (home.settings, point)) == [-signal.SIGKILL]
    left = active(home)
    assert left.resumable
    assert (act_of(home).outcome, act_of(home).operation) == (None, left.id)
    assert live_version(home) == (1 if point == "after-switch" else 0)
    home.check_served(live_version(home))
    with replica(home):
        done = ended(home, left.id)
    assert (done.state, done.error) == (OperationState.SUCCEEDED, None)
    assert done.owner != left.owner
    assert done.result is not None
    assert done.result["live_version"] == 1
    home.check_served(1)
    assert history(home) == [("promote", 1, left.id), ("promote", 0, None)]
    assert home.backcast.registry.operations.active() is None
    assert (act_of(home).outcome, act_of(home).key) == (Outcome.SUCCEEDED, "1a2b3c4d")
    assert act_of(home).details["live_version"] == 1


def command_and_die(settings: Settings, point: str) -> None:
    with open_backcast(settings) as backcast:
        KILLS[point](backcast)
        with backcast.registry.audit.recording(Actor("cli:ann"), PROMOTING) as recorded:
            run_order(backcast, Promote(1), "cli:ann", timeout=TIMEOUT, act=recorded.id)


@pytest.mark.parametrize("point", KILLS)
def test_promotion_of_a_dead_command_is_ended_by_a_replica(home: Home, point: str) -> None:
    assert exit_codes(command_and_die, (home.settings, point)) == [-signal.SIGKILL]
    left = active(home)
    with replica(home):
        done = ended(home, left.id)
    if point == "after-switch":
        assert (done.state, done.error) == (OperationState.SUCCEEDED, None)
        assert act_of(home).outcome is Outcome.SUCCEEDED
        home.check_served(1)
        return
    assert (act_of(home).outcome, act_of(home).code) == (Outcome.FAILED, "operation-abandoned")
    assert done.state is OperationState.FAILED
    assert done.error is not None
    assert done.error["code"] == "operation-abandoned"
    assert done.error["message"].startswith(f"Abandoned by {left.owner}, which gave no sign")
    assert done.error["message"].endswith("nothing was switched.")
    home.check_served(0)
    home.promote(1)
    home.check_served(1)


def compact_and_die(settings: Settings, point: str) -> None:
    with open_backcast(settings) as backcast:
        if point == "write":
            Snapshots.register = die  # type: ignore[method-assign]
        else:
            die_at_step(backcast, point)
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        with Operator(backcast, engine, TIMEOUT) as operator:
            operator.start(Refresh(0, 0, compacted=True), "ann")
            time.sleep(WAIT_S)


@pytest.mark.parametrize("point", ["write", "check", "load", "switch"])
def test_compaction_of_a_dead_replica_is_carried_on_and_done_once(home: Home, point: str) -> None:
    vectors = np.ones((1, 4), np.float32)
    upsert(home.backcast, Entity.ITEM, ["new"], vectors, actor="ann", most_changed=9)
    assert exit_codes(compact_and_die, (home.settings, point)) == [-signal.SIGKILL]
    written = [r for r in home.backcast.registry.snapshots.undeleted() if r.version == 0]
    assert len(written) == (1 if point == "write" else 2)
    left = active(home)
    with replica(home):
        done = ended(home, left.id)
    assert (done.state, done.error) == (OperationState.SUCCEEDED, None)
    live = home.backcast.registry.deployments.live()
    assert live is not None
    assert (live.version, live.delta) == (0, 0)
    held = home.backcast.store.open(live.snapshot)
    assert held.gather(Entity.ITEM, ["new"]).vectors.tolist() == [[1.0] * 4]
    assert len([r for r in home.backcast.registry.snapshots.undeleted() if r.version == 0]) == 2


@pytest.mark.parametrize("accept", [accept_and_die, command_and_die], ids=["replica", "command"])
def test_command_waits_for_an_abandoned_operation_ends_it_and_goes_on(
    home: Home, accept: Callable[..., None]
) -> None:
    assert exit_codes(accept, (home.settings, "load")) == [-signal.SIGKILL]
    left, said = active(home), list[str]()
    begun = time.monotonic()
    outcome = run_order(home.backcast, Promote(1), "cli:bob", timeout=TIMEOUT, say=said.append)
    assert time.monotonic() - begun >= TIMEOUT
    assert outcome.live.version == 1
    assert [line for line in said if left.id in line] == said
    assert ["waiting up to" in said[0], "was abandoned and is ended" in said[1]] == [True, True]
    assert home.backcast.registry.operations.get(left.id).state is OperationState.FAILED
    home.check_served(1)


# --- two at once ----------------------------------------------------------------------------------


class Gate:
    """Holds an operation up at a step until it is opened."""

    def __init__(self, home: Home, step: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._step = step

    def hold(self, backcast: Backcast) -> None:
        progress = backcast.registry.operations.progress

        def watched(claim: Claim, step: str, fraction: float) -> None:
            progress(claim, step, fraction)
            if step == self._step:
                self.reached.set()
                assert self.opened.wait(WAIT_S)

        backcast.registry.operations.progress = watched  # type: ignore[method-assign]


def test_second_promotion_is_refused_over_http_and_on_the_command_line(home: Home) -> None:
    gate = Gate(home, "load")
    with replica(home) as first, replica(home) as second:
        gate.hold(first._backcast)
        operation, _ = first.start(Promote(1, 0), "ann")
        assert gate.reached.wait(WAIT_S)
        for again in (
            lambda: second.start(Promote(2, 0), "bob"),
            lambda: first.start(Promote(2, 0), "bob"),
            lambda: run_order(home.backcast, Promote(2), "cli:bob", timeout=TIMEOUT),
        ):
            with pytest.raises(OperationRunning, match="step load, 40 % done") as refused:
                again()
            assert refused.value.data["operation"] == operation.id
            assert refused.value.data["owner"] == operation.owner
        time.sleep(2 * TIMEOUT)  # the owner lives, however long it takes
        assert active(home).owner == operation.owner
        gate.opened.set()
        assert ended(home, operation.id).state is OperationState.SUCCEEDED
    home.check_served(1)


def test_many_promotions_at_once_leave_one_winner(home: Home) -> None:
    with replica(home) as first, replica(home) as second:
        starts = [lambda: first.start(Promote(1, 0), "a"), lambda: second.start(Promote(2, 0), "b")]
        outcomes: list[Any] = []

        def run(start: Callable[[], Any]) -> None:
            try:
                outcomes.append(start()[0])
            except Conflict as error:
                outcomes.append(error)

        threads = [threading.Thread(target=run, args=(start,)) for start in starts * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begun = [o for o in outcomes if isinstance(o, Operation)]
        finals = [ended(home, operation.id) for operation in begun]
    won = [o for o in finals if o.state is OperationState.SUCCEEDED]
    assert won
    promotions = [row for row in history(home) if row[2] is not None]
    assert [row[2] for row in reversed(promotions)] == [o.id for o in won]
    home.check_served(live_version(home))


def test_key_sent_again_finds_the_same_operation(home: Home) -> None:
    with replica(home) as first, replica(home) as second:
        begun, is_new = first.start(Promote(1, 0), "ann", "morning")
        assert is_new
        ended(home, begun.id)
        again, is_new = second.start(Promote(1, 0), "ann", "morning")
        assert (again.id, is_new) == (begun.id, False)
    assert len(home.backcast.registry.operations.recent(10)) == 1


# --- called off -----------------------------------------------------------------------------------


class Hold:
    """Holds the first operation that comes to a point up until it is opened."""

    def __init__(self, point: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._point = point

    def _wait(self, point: str) -> None:
        if point == self._point and not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(WAIT_S)

    def put(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hold up all operations of this process."""
        progress, succeed = Operations.progress, Operations.succeed

        def watched(operations: Operations, claim: Claim, step: str, fraction: float) -> None:
            progress(operations, claim, step, fraction)
            self._wait("half loaded" if step == "load" and 0.4 < fraction < 0.9 else step)

        def late(operations: Operations, claim: Claim, result: Any) -> None:
            self._wait("switched")
            succeed(operations, claim, result)

        monkeypatch.setattr(Operations, "progress", watched)
        monkeypatch.setattr(Operations, "succeed", late)


def newest(home: Home, version: int) -> str:
    found = home.backcast.registry.snapshots.latest(version)
    assert found is not None
    return found.id


def problem_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["type"].removeprefix("urn:backcast:problem:")


@pytest.mark.parametrize("step", ["check", "load", "half loaded", "switch"])
def test_promotion_is_called_off_and_rolled_back_at_once(
    home: Home, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    hold = Hold(step)
    home.promote(1)
    with client_of(home) as client:
        hold.put(monkeypatch)
        order = client.post("/admin/versions/2/promote", json={"expected_live": 1})
        begun, act = order.json(), act_of(home)
        assert hold.reached.wait(WAIT_S)
        back = {"expected_live": 1, "reason": "clicks fell"}
        assert problem_of(client.post("/admin/rollback", json=back)) == (409, "operation-running")
        path, why = f"/admin/operations/{begun['id']}/cancel", {"reason": "clicks fell"}
        cancelled = client.post(path, json=why)
        assert cancelled.status_code == 200
        ended_at = cancelled.json()["finished_at"]
        assert ended_at is not None
        assert (cancelled.json()["state"], cancelled.json()["owner"]) == ("failed", begun["owner"])
        assert cancelled.json()["error"] == {
            "code": "operation-cancelled",
            "message": f'Operation {begun["id"]} was cancelled by consumer 0 ("clicks fell"); '
            "nothing was switched.",
            "operation": begun["id"],
            "by": "consumer 0",
            "reason": "clicks fell",
        }
        rolled = client.post("/admin/rollback", json=back)
        assert rolled.status_code == 202
        assert ended(home, rolled.json()["id"]).state is OperationState.SUCCEEDED
        home.check_served(0)
        hold.opened.set()
        again = client.post(path, json={"reason": "another"})
        assert (again.status_code, again.json()) == (200, cancelled.json())
        running = client.app_state["service"].operator._running
        deadline = time.monotonic() + WAIT_S
        while running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert problem_of(client.post(rolled.headers["Location"] + "/cancel", json={})) == (
            *(409, "conflict"),
        )
    home.check_served(0)
    assert [(kind, version) for kind, version, _ in history(home)] == [
        *(("rollback", 0), ("promote", 1), ("promote", 0)),
    ]
    [found] = [one for one in home.backcast.registry.audit.recent(20) if one.id == act.id]
    assert (found.act, found.outcome, found.code) == ("promote", "failed", "operation-cancelled")
    assert [
        (one.target, one.reason, one.outcome)
        for one in reversed(home.backcast.registry.audit.recent(20))
        if one.act == "cancel"
    ] == [
        (f"operation {begun['id']}", "clicks fell", "succeeded"),
        (f"operation {begun['id']}", "another", "succeeded"),
        (f"operation {rolled.json()['id']}", None, "refused"),
    ]
    kept = home.backcast.registry.drifts.of(newest(home, 1))
    assert kept is not None
    folders = home.backcast.artifacts.folders()
    assert [name for name in folders if name.startswith("drifts/")] == [kept.folder]
    home.promote(2, force=True, reason="it was not its fault")
    home.check_served(2)


def test_what_is_switched_is_not_called_off(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = Hold("switched")
    hold.put(monkeypatch)
    with replica(home) as operator:
        operation, _ = operator.start(Promote(1, 0), "ann")
        assert hold.reached.wait(WAIT_S)
        with pytest.raises(Conflict, match="has made version 1 live already; a rollback goes back"):
            cancel(home.backcast.registry, operation.id, actor="bob")
        hold.opened.set()
        done = ended(home, operation.id)
        assert (done.state, done.error) == (OperationState.SUCCEEDED, None)
        with pytest.raises(Conflict, match="has succeeded already; a rollback goes back"):
            cancel(home.backcast.registry, operation.id, actor="bob")
    home.check_served(1)


def test_switch_between_the_look_and_the_cancellation_stands(home: Home) -> None:
    operations = home.backcast.registry.operations
    operation = begin(home.backcast, Promote(1, 0), "ann", owner="host:1")
    seen = operations.get(operation.id)
    home.promote(1, operation=Claim(operation.id, "host:1"))
    assert not operations.cancel(seen, OperationCancelled(operation.id, "bob", None))
    operations.succeed(Claim(operation.id, "host:1"), {})
    assert operations.get(operation.id).state is OperationState.SUCCEEDED


def test_nobody_carries_on_what_was_called_off(home: Home) -> None:
    assert exit_codes(accept_and_die, (home.settings, "load")) == [-signal.SIGKILL]
    left = active(home)
    cancelled = cancel(home.backcast.registry, left.id, actor="bob")
    with replica(home):
        time.sleep(3 * TIMEOUT)
        assert home.backcast.registry.operations.get(left.id) == cancelled
    assert (act_of(home).outcome, act_of(home).code) == (Outcome.FAILED, "operation-cancelled")
    home.check_served(0)


def test_collection_is_not_called_off(home: Home) -> None:
    operations = home.backcast.registry.operations
    operation = operations.start(OperationDraft("collect", {}, "ann", "host:1"))
    with pytest.raises(Conflict, match=r"\(collect\) cannot be cancelled"):
        cancel(home.backcast.registry, operation.id, actor="bob")
    assert active(home) == operation


def promote_by_command(environment: dict[str, str], folder: Path) -> None:
    """Run ``backcast promote 1``; wait in the loading for a file called "go"."""
    progress, go = Operations.progress, folder / "go"

    def watched(operations: Operations, claim: Claim, step: str, fraction: float) -> None:
        progress(operations, claim, step, fraction)
        while step == "load" and not go.exists():
            (folder / "reached").touch()
            time.sleep(0.02)

    Operations.progress = watched  # type: ignore[assignment,method-assign]
    os.environ.update(environment)
    sys.argv = ["backcast", "promote", "1"]
    with (folder / "stderr").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
        main()


def test_command_is_called_off_from_another_process(home: Home, tmp_path: Path) -> None:
    environment = replica_environment(home.settings)
    process = SPAWNER.Process(target=promote_by_command, args=(environment, tmp_path))
    process.start()
    try:
        deadline = time.monotonic() + WAIT_S
        while not (tmp_path / "reached").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        id = active(home).id
        called_off = subprocess.run(
            [
                sys.executable,
                "-m",
                "backcast",
                "operations",
                id,
                "--cancel",
                "--reason",
                "too late",
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert (called_off.returncode, called_off.stderr) == (0, "")
        assert id in called_off.stdout
        assert home.backcast.registry.operations.active() is None
        (tmp_path / "go").touch()
        process.join(WAIT_S)
        assert process.exitcode == 1
    finally:
        process.kill()
        process.join()
    told = [line for line in (tmp_path / "stderr").read_text().splitlines() if "error" in line]
    assert len(told) == 1
    assert told[0].startswith(f"error: Operation {id} was cancelled by cli:")
    assert told[0].endswith('("too late"); nothing was switched.')
    acts = home.backcast.registry.audit.recent(10)
    assert [(act.act, act.outcome, act.code) for act in acts] == [
        ("cancel", "succeeded", None),
        ("promote", "failed", "operation-cancelled"),
    ]
    home.check_served(0)
    home.promote(1)
    home.check_served(1)


# --- what goes wrong after the switch -------------------------------------------------------------


def promote_here(home: Home, harm: Callable[[Operator], None]) -> None:
    """Promote version 1 as a replica does, harmed; demand that it counts as what it is: done."""
    counted: list[tuple[str, Exception | None]] = []
    with open_backcast(home.settings) as backcast:
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        with (
            Operator(backcast, engine, TIMEOUT, lambda *one: counted.append(one)) as operator,
            backcast.registry.audit.recording(Actor("ann"), PROMOTING) as recorded,
        ):
            harm(operator)
            operation, _ = operator.start(Promote(1, 0), "ann", act=recorded.id)
            done = ended(home, operation.id)
    assert (done.state, done.error) == (OperationState.SUCCEEDED, None)
    assert done.result is not None
    assert done.result["live_version"] == 1
    assert counted == [("promote", None)]
    assert (act_of(home).outcome, act_of(home).code) == (Outcome.SUCCEEDED, None)
    home.check_served(1)


def test_switch_that_this_replica_cannot_follow_has_succeeded(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory")

    def harm(operator: Operator) -> None:
        operator._engine.refresh = out_of_memory  # type: ignore[method-assign]

    promote_here(home, harm)
    assert "version 1 is live, not yet here" in caplog.text
    assert "CUDA out of memory" in caplog.text


def test_switch_before_an_unforeseen_error_has_succeeded(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    def harm(operator: Operator) -> None:
        operations, pending = operator._backcast.registry.operations, [RuntimeError("a bug")]
        succeed = operations.succeed

        def fail_once(claim: Claim, result: Any) -> None:
            if pending:
                raise pending.pop()
            succeed(claim, result)

        operations.succeed = fail_once  # type: ignore[method-assign]

    promote_here(home, harm)
    assert "a bug" in caplog.text


def test_refresh_is_one_switch_whatever_is_published_meanwhile(home: Home) -> None:
    wanted, published = home.publish(0, seed=1), home.vectors[0]

    def report(step: str, _fraction: float) -> None:
        if step == "switch":
            home.publish(0, seed=2)

    outcome = run_order(home.backcast, Refresh(0), "cli:ann", timeout=TIMEOUT, report=report)
    assert outcome.live.snapshot == wanted.id
    [operation] = home.backcast.registry.operations.recent(10)
    assert history(home) == [("refresh", 0, operation.id), ("promote", 0, None)]
    home.vectors[0] = published
    home.check_served(0)


# --- owners that sleep ----------------------------------------------------------------------------


def stop_here() -> None:
    """Stop this process before this thread does any more: sent to the process, it would go on."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def accept_and_pause(settings: Settings, point: str) -> None:
    """Accept a promotion as a replica does; sleep at a step until somebody wakes this up."""
    with open_backcast(settings) as backcast:
        operations = backcast.registry.operations
        progress, succeed, beat = operations.progress, operations.succeed, operations.beat
        beating = threading.Lock()  # a process stopped while it writes would hold SQLite's lock

        def beat_alone(claim: Claim) -> None:
            with beating:
                beat(claim)

        def watched(claim: Claim, step: str, fraction: float) -> None:
            if step == point:
                with beating:
                    stop_here()
            progress(claim, step, fraction)

        def late(claim: Claim, result: Any) -> None:
            if point == "end":
                with beating:
                    stop_here()
            succeed(claim, result)

        operations.beat = beat_alone  # type: ignore[method-assign]
        operations.progress = watched  # type: ignore[method-assign]
        operations.succeed = late  # type: ignore[method-assign]
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        with Operator(backcast, engine, TIMEOUT) as operator:
            operator.start(Promote(1, 0), "ann")
            deadline = time.monotonic() + WAIT_S
            while operator._running and time.monotonic() < deadline:
                time.sleep(0.02)


def stopped(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


@pytest.mark.parametrize("step", ["check", "load", "switch", "end"])
def test_owner_that_wakes_up_after_a_takeover_changes_nothing(home: Home, step: str) -> None:
    process = SPAWNER.Process(target=accept_and_pause, args=(home.settings, step))
    process.start()
    try:
        assert process.pid is not None
        deadline = time.monotonic() + WAIT_S
        while not stopped(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        left = active(home)
        with replica(home):
            done = ended(home, left.id)
        assert done.state is OperationState.SUCCEEDED
        before = history(home)
        os.kill(process.pid, signal.SIGCONT)
        process.join(WAIT_S)
        assert process.exitcode == 0
        assert home.backcast.registry.operations.get(left.id) == done
        assert history(home) == before == [("promote", 1, left.id), ("promote", 0, None)]
        home.check_served(1)
    finally:
        process.kill()
        process.join()


def test_owner_that_wakes_up_after_its_operation_has_failed_switches_nothing(home: Home) -> None:
    process = SPAWNER.Process(target=accept_and_pause, args=(home.settings, "switch"))
    process.start()
    try:
        assert process.pid is not None
        deadline = time.monotonic() + WAIT_S
        while not stopped(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        left = active(home)
        # What it was about to switch would still pass: live is what it saw.
        run_order(home.backcast, Promote(2, 0), "cli:bob", timeout=TIMEOUT)
        run_order(home.backcast, Rollback(2, "worse"), "cli:bob", timeout=TIMEOUT)
        before = history(home)
        os.kill(process.pid, signal.SIGCONT)
        process.join(WAIT_S)
        assert process.exitcode == 0
        assert home.backcast.registry.operations.get(left.id).state is OperationState.FAILED
        assert history(home) == before
        home.check_served(0)
    finally:
        process.kill()
        process.join()


def accept_and_pause_in_switch(settings: Settings) -> None:
    postgres.IDLE_S = 1.0

    def pause(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE live"):
            stop_here()

    with open_backcast(settings) as backcast:
        event.listen(backcast.registry._engine, "after_cursor_execute", pause)
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        with Operator(backcast, engine, TIMEOUT) as operator:
            operator.start(Promote(1, 0), "ann")
            deadline = time.monotonic() + WAIT_S
            while operator._running and time.monotonic() < deadline:
                time.sleep(0.02)


def test_owner_that_sleeps_within_a_transaction_of_postgresql_keeps_nobody_waiting(
    tmp_path: Path, empty_registry: str
) -> None:
    with build_home(tmp_path, live=0, database_url=empty_registry) as home:
        process = SPAWNER.Process(target=accept_and_pause_in_switch, args=(home.settings,))
        process.start()
        try:
            assert process.pid is not None
            deadline = time.monotonic() + WAIT_S
            while not stopped(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            left = active(home)
            with replica(home):
                done = ended(home, left.id)
            assert done.state is OperationState.SUCCEEDED
            before = history(home)
            os.kill(process.pid, signal.SIGCONT)
            process.join(WAIT_S)
            assert process.exitcode == 0
            assert home.backcast.registry.operations.get(left.id) == done
            assert history(home) == before == [("promote", 1, left.id), ("promote", 0, None)]
            home.check_served(1)
        finally:
            process.kill()
            process.join()


# --- shutdown, clocks, an absent registry ---------------------------------------------------------


def test_replica_that_stops_hands_its_operation_back_at_once(home: Home) -> None:
    gate = Gate(home, "load")
    with replica(home, watching=False) as first:
        gate.hold(first._backcast)
        operation, _ = first.start(Promote(1, 0), "ann")
        assert gate.reached.wait(WAIT_S)
        threading.Timer(0.2, gate.opened.set).start()
    left = active(home)
    assert (left.id, left.owner, left.state) == (operation.id, None, OperationState.RUNNING)
    assert live_version(home) == 0
    begun = time.monotonic()
    with replica(home):
        done = ended(home, operation.id)
        assert time.monotonic() - begun < TIMEOUT  # nobody is waited for
    assert done.state is OperationState.SUCCEEDED
    assert history(home)[0] == ("promote", 1, operation.id)
    home.check_served(1)


@pytest.mark.parametrize("hours", [-30, 30])
def test_clocks_that_differ_by_hours_decide_nothing(home: Home, hours: int) -> None:
    skew = timedelta(hours=hours)
    operations = home.backcast.registry.operations
    operation = begin(
        home.backcast, Promote(1, 0), "ann", owner=new_owner("replica on"), resumable=True
    )
    assert operation.owner is not None
    claim = Claim(operation.id, operation.owner)

    def beat_by_another_clock() -> None:
        operations.beat(claim)
        with home.backcast.registry._engine.begin() as connection:
            connection.execute(
                update(tables.operations).values(
                    heartbeat_at=operation.created_at + skew, created_at=operation.created_at + skew
                )
            )

    with replica(home):
        for _ in range(15):  # alive, whatever its clock says
            beat_by_another_clock()
            time.sleep(TIMEOUT / 5)
            assert active(home).owner == operation.owner
        done = ended(home, operation.id)  # dead, whatever its clock said
    assert (done.state, live_version(home)) == (OperationState.SUCCEEDED, 1)


class Clock:
    """A monotonic clock that is told what time it is."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestWatcher:
    """Only time that the watcher was awake, and the registry there, counts."""

    @pytest.fixture
    def watched(self, tmp_path: Path) -> Iterator[tuple[Home, Watcher, Clock, Claim]]:
        with build_home(tmp_path, ()) as home:
            operations, clock = home.backcast.registry.operations, Clock()
            operation = operations.start(OperationDraft("promote", {}, "ann", "host:1"))
            yield home, Watcher(operations, 15.0, clock), clock, Claim(operation.id, "host:1")

    def still(self, watcher: Watcher, clock: Clock, *seconds: float) -> float:
        found = watcher.look()
        for passed in seconds:
            clock.now += passed
            found = watcher.look()
        assert found is not None
        return found.still

    def test_counts_from_the_first_look(self, watched: Any) -> None:
        _, watcher, clock, _ = watched
        assert self.still(watcher, clock) == 0
        assert self.still(watcher, clock, 5, 5, 6) == 16

    def test_begins_anew_with_every_beat(self, watched: Any) -> None:
        home, watcher, clock, claim = watched
        assert self.still(watcher, clock, 10, 4) == 14
        home.backcast.registry.operations.beat(claim)
        assert self.still(watcher, clock, 4) == 4

    def test_its_own_sleep_does_not_count(self, watched: Any) -> None:
        _, watcher, clock, _ = watched
        assert self.still(watcher, clock, 5, 3600, 1) == 1

    def test_absence_of_the_registry_does_not_count(
        self, watched: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home, watcher, clock, _ = watched
        assert self.still(watcher, clock, 14) == 14

        def away() -> None:
            raise RegistryError("away")

        with monkeypatch.context() as patch:
            patch.setattr(home.backcast.registry.operations, "active", away)
            clock.now += 3
            with pytest.raises(RegistryError):
                watcher.look()
        clock.now += 3
        assert self.still(watcher, clock, 1) == 1

    def test_nothing_is_active(self, watched: Any) -> None:
        home, watcher, clock, claim = watched
        self.still(watcher, clock, 14)
        home.backcast.registry.operations.succeed(claim, {})
        assert watcher.look() is None


def test_operation_outlives_an_absence_of_the_registry(home: Home) -> None:
    with replica(home) as operator:
        registry, away, failures = operator._backcast.registry, threading.Event(), list[str]()
        gate = Gate(home, "load")
        gate.hold(operator._backcast)

        def refuse(_connection: Any) -> None:
            if away.is_set():
                failures.append("refused")
                raise RegistryError("The registry does not answer.")

        event.listen(registry._engine, "begin", refuse)
        operation, _ = operator.start(Promote(1, 0), "ann")
        assert gate.reached.wait(WAIT_S)
        away.set()
        gate.opened.set()
        time.sleep(2 * TIMEOUT)
        assert active(home).id == operation.id
        assert failures
        away.clear()
        done = ended(home, operation.id)
    assert (done.state, done.owner) == (OperationState.SUCCEEDED, operation.owner)
    home.check_served(1)
    assert history(home)[0] == ("promote", 1, operation.id)


def test_lost_answer_to_the_switch_is_no_second_switch(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployments = home.backcast.registry.deployments
    switch, lost = deployments.switch_in_turn, list[str]()

    def lose_answer(make: Any) -> Any:
        live = switch(make)
        if not lost:
            lost.append(live.snapshot)
            raise RegistryError("The answer was lost.")
        return live

    monkeypatch.setattr(deployments, "switch_in_turn", lose_answer)
    outcome = run_order(home.backcast, Promote(1), "cli:ann", timeout=TIMEOUT)
    assert (outcome.live.version, outcome.live.snapshot) == (1, lost[0])
    assert len(history(home)) == 2
    [operation] = home.backcast.registry.operations.recent(10)
    assert operation.state is OperationState.SUCCEEDED


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "switched"), [("load", False), ("end", True)])
def test_interrupt_ends_the_operation(
    home: Home, monkeypatch: pytest.MonkeyPatch, step: str, switched: bool
) -> None:
    operations = home.backcast.registry.operations
    succeed, pressed = operations.succeed, list[str]()

    def report(found: str, _fraction: float) -> None:
        if found == step:
            raise KeyboardInterrupt

    def interrupted(claim: Claim, result: Any) -> None:
        if step == "end" and not pressed:
            pressed.append("Ctrl-C")
            raise KeyboardInterrupt
        succeed(claim, result)

    monkeypatch.setattr(operations, "succeed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_order(home.backcast, Promote(1), "cli:ann", timeout=TIMEOUT, report=report)
    [operation] = operations.recent(1)
    if switched:
        assert operation.state is OperationState.SUCCEEDED
    else:
        assert operation.error == {
            "code": "operation-abandoned",
            "message": "Interrupted; nothing was switched.",
        }
    assert operations.active() is None
    assert live_version(home) == (1 if switched else 0)


def test_interrupt_just_after_the_switch_leaves_the_bounds(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = home.backcast.registry
    switch = registry.deployments.switch_in_turn

    def interrupted(make: Any) -> Any:
        switch(make)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry.deployments, "switch_in_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_order(home.backcast, Promote(1), "cli:ann", timeout=TIMEOUT)
    [operation] = registry.operations.recent(10)
    assert operation.state is OperationState.SUCCEEDED
    check_bounds(home)


def check_bounds(home: Home) -> None:
    """Demand that the drift bounds of what is live are there: in the store, and as files."""
    live = home.backcast.registry.deployments.live()
    assert live is not None
    drift = home.backcast.registry.drifts.of(live.snapshot)
    assert drift is not None
    bounds = open_bounds(drift, home.backcast.store)
    assert bounds is not None
    [batch] = [b for b in read_snapshot(home.backcast.artifacts, drift) if b.entity is Entity.ITEM]
    found = bounds.of(Entity.ITEM, batch.ids, 0)
    assert found.tobytes() == np.ascontiguousarray(batch.vectors[:, 0]).tobytes()
    assert (found > 0).all()


@pytest.mark.parametrize("cause", [KeyboardInterrupt, PromotionConflict])
def test_bounds_that_cannot_be_deleted_hide_no_error(
    home: Home, monkeypatch: pytest.MonkeyPatch, cause: type[BaseException]
) -> None:
    def report(step: str, _fraction: float) -> None:
        if step == "switch":
            raise cause("the reason why")

    asked: list[str] = []

    def refuse(_: Any, path: str, **__: Any) -> None:
        asked.append(path)
        raise PermissionError("not allowed")

    monkeypatch.setattr(LocalFileSystem, "rm", refuse)
    with pytest.raises(cause, match="the reason why"):
        home.promote(1, report=report)
    assert "/drifts/" in asked[0]
    home.check_served(0)


def test_command_that_is_refused_at_once_leaves_no_operation(home: Home) -> None:
    with pytest.raises(PromotionConflict):
        run_order(home.backcast, Promote(1, expected_live=2), "cli:ann", timeout=TIMEOUT)
    assert home.backcast.registry.operations.recent(10) == []


def test_gate_that_fails_ends_the_operation_with_all_it_found(home: Home) -> None:
    record = home.backcast.registry.snapshots.latest(1)
    assert record is not None
    home.backcast.artifacts.delete(record.folder)
    with pytest.raises(BackcastError, match="gate snapshot"):
        run_order(home.backcast, Promote(1), "cli:ann", timeout=TIMEOUT)
    [operation] = home.backcast.registry.operations.recent(10)
    assert operation.state is OperationState.FAILED
    assert operation.error is not None
    assert operation.error["code"] == "conflict"
    assert {gate["name"] for gate in operation.error["gates"]} >= {"snapshot", "maps"}


def test_owner_that_lost_its_operation_is_told(home: Home) -> None:
    def rob(step: str, _fraction: float) -> None:
        if step == "load":
            assert home.backcast.registry.operations.take(active(home), "thief") is not None

    with pytest.raises(OperationAbandoned, match="is not run by command on"):
        run_order(home.backcast, Promote(1), "cli:ann", timeout=TIMEOUT, report=rob)
    assert live_version(home) == 0
    assert active(home).owner == "thief"


# --- over HTTP ------------------------------------------------------------------------------------


def test_operations_are_listed_newest_first(home: Home) -> None:
    run_order(home.backcast, Promote(1), "cli:ann", timeout=TIMEOUT)
    with pytest.raises(PromotionConflict):
        run_order(home.backcast, Promote(1), "cli:ann", timeout=TIMEOUT)
    run_order(home.backcast, Rollback(1, "worse"), "cli:bob", timeout=TIMEOUT)
    with client_of(home) as client:
        listed = client.get("/admin/operations").json()["operations"]
        assert [(o["kind"], o["state"], o["actor"], o["resumable"]) for o in listed] == [
            ("rollback", "succeeded", "cli:bob", False),
            ("promote", "succeeded", "cli:ann", False),
        ]
        assert client.get("/admin/operations?limit=1").json()["operations"] == listed[:1]
        assert client.get("/admin/operations?limit=0").status_code == 422
