"""The soak's checker finds what it is there to find, and accuses nobody of what is right."""

import os
import sys
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from backcast.versions import Entity
from benchmarks.soak import Plan, left_out
from benchmarks.soak_acts import CONVERGED_S, Outage, Watcher
from benchmarks.soak_checker import (
    Answer,
    Fault,
    Finding,
    Question,
    UnknownState,
    judge,
    judge_problem,
)
from benchmarks.soak_ledger import Id, Ledger, Row, Span
from benchmarks.soak_readers import Field
from benchmarks.soak_replicas import Replica
from benchmarks.soak_tally import Absences, Tally
from benchmarks.soak_world import make_models

ITEM = Entity.ITEM
IDS = ["a", "b", "c"]
OLD, NEW, OTHER = "v1-old", "v3-new", "v2-other"


def rows(version: int, ids: list[str], seed: int) -> dict[Id, Row]:
    dim = make_models(np.random.default_rng(0)).dims[version]
    drawn = np.random.default_rng([version, seed]).standard_normal((len(ids), dim), np.float32)
    return {(ITEM, id): row for id, row in zip(ids, drawn, strict=True)}


@pytest.fixture
def ledger() -> Ledger:
    """Version 1, then version 3 on top of it, on which ``b`` was put anew and ``c`` erased."""
    made = Ledger(make_models(np.random.default_rng(0)))
    for name, version in ((OLD, 1), (NEW, 3), (OTHER, 2)):
        made.will_publish(version, rows(version, IDS, 0))
        made.add_snapshot(name, version)
    made.will_upsert(rows(3, ["b", "d"], 1))
    made.add_delta(NEW, 1, rows(3, ["b", "d"], 1))
    made.will_erase([(ITEM, "c")])
    made.add_delta(NEW, 2, {(ITEM, "c"): None})
    return made


def served(ledger: Ledger, state: str, target: int, ids: list[str]) -> NDArray[np.float32]:
    """Return what a sound service answers in a state, worked out map by map."""
    snapshot, _, delta = state.rpartition(".")
    live = ledger.version_of(snapshot)
    dim = ledger.models.dims[target]
    stored = ledger.rows(snapshot, int(delta), ITEM, ids)
    answer = np.full((len(ids), dim), np.nan, np.float32)
    for at, row in enumerate(stored):
        if row is not None:
            z = row.astype(np.float64)
            for version in ledger.models.chain(live):
                if version == target:
                    break
                weight, bias = ledger.models.steps[version]
                z = weight @ z + bias
            answer[at] = z
    return answer


def answer(ledger: Ledger, state: str, target: int, ids: list[str]) -> Answer:
    live = ledger.version_of(state.rpartition(".")[0])
    return Answer(state, target, live, served(ledger, state, target, ids))


def faults(findings: list[Finding]) -> list[Fault]:
    return [finding.fault for finding in findings]


@pytest.mark.parametrize("state", [f"{OLD}.0", f"{NEW}.0", f"{NEW}.1", f"{NEW}.2", f"{OTHER}.0"])
@pytest.mark.parametrize("target", [0, 1])
def test_what_is_right_is_accused_of_nothing(ledger: Ledger, state: str, target: int) -> None:
    ids = ["d", "c", "nobody", "b", "a", "b"]
    assert judge(ledger, Question(ITEM, ids, target), answer(ledger, state, target, ids)) == []
    for expected in (state, state.rpartition(".")[0]):
        demanding = Question(ITEM, ids, target, expected)
        assert judge(ledger, demanding, answer(ledger, state, target, ids)) == []


@pytest.mark.parametrize("change", [1.001, -1.0, 0.0])
def test_wrong_vector_is_found(ledger: Ledger, change: float) -> None:
    given = answer(ledger, f"{NEW}.2", 1, IDS)
    given.vectors[0] *= np.float32(change)
    findings = judge(ledger, Question(ITEM, IDS, 1), given)
    assert faults(findings) == [Fault.WRONG]
    assert "'a'" in findings[0].text


def test_one_wrong_number_is_found(ledger: Ledger) -> None:
    given = answer(ledger, f"{NEW}.2", 1, IDS)
    given.vectors[0, 3] += np.float32(1e-3)
    assert faults(judge(ledger, Question(ITEM, IDS, 1), given)) == [Fault.WRONG]


def test_two_vectors_in_each_others_place_are_found(ledger: Ledger) -> None:
    given = answer(ledger, f"{OLD}.0", 0, IDS)
    given.vectors[[0, 1]] = given.vectors[[1, 0]]
    findings = judge(ledger, Question(ITEM, IDS, 0), given)
    assert faults(findings) == [Fault.WRONG, Fault.WRONG]


@pytest.mark.parametrize("torn", [[0], [1], [0, 1]])
def test_batch_with_rows_of_another_snapshot_is_torn(ledger: Ledger, torn: list[int]) -> None:
    given = answer(ledger, f"{NEW}.0", 1, IDS)
    given.vectors[torn] = served(ledger, f"{OLD}.0", 1, IDS)[torn]
    findings = judge(ledger, Question(ITEM, IDS, 1), given)
    assert faults(findings) == [Fault.TORN] * len(torn)
    assert f"the vector of {OLD}.0" in findings[0].text


def test_answer_that_names_another_state_than_its_own_is_torn(ledger: Ledger) -> None:
    whole = answer(ledger, f"{OLD}.0", 1, IDS)
    renamed = Answer(f"{NEW}.0", 1, 3, whole.vectors)
    assert faults(judge(ledger, Question(ITEM, IDS, 1), renamed)) == [Fault.TORN] * 3
    other_live = Answer(f"{NEW}.0", 1, 1, answer(ledger, f"{NEW}.0", 1, IDS).vectors)
    assert faults(judge(ledger, Question(ITEM, IDS, 1), other_live)) == [Fault.TORN]


def test_answer_from_another_snapshot_than_the_one_demanded_is_torn(ledger: Ledger) -> None:
    for expected in (OLD, f"{OLD}.0", f"{NEW}.1"):
        asked = Question(ITEM, IDS, 1, expected)
        assert faults(judge(ledger, asked, answer(ledger, f"{NEW}.2", 1, IDS))) == [Fault.TORN]


def test_vector_before_an_acknowledged_upsert_is_lost(ledger: Ledger) -> None:
    given = answer(ledger, f"{NEW}.0", 1, ["a", "b"])
    stale = Answer(f"{NEW}.1", 1, 3, given.vectors)
    findings = judge(ledger, Question(ITEM, ["a", "b"], 1), stale)
    assert faults(findings) == [Fault.LOST]
    assert "'b'" in findings[0].text


def test_upsert_that_is_not_there_is_lost(ledger: Ledger) -> None:
    given = answer(ledger, f"{NEW}.1", 1, ["a", "d"])
    given.vectors[1] = np.nan
    assert faults(judge(ledger, Question(ITEM, ["a", "d"], 1), given)) == [Fault.LOST]
    problem = {"type": "urn:backcast:problem:unknown-id", "snapshot": f"{NEW}.1"}
    assert faults(judge_problem(ledger, Question(ITEM, ["d"], 1), problem) or []) == [Fault.LOST]


def test_erased_id_that_answers_is_lost(ledger: Ledger) -> None:
    before = answer(ledger, f"{NEW}.1", 1, ["c"])
    given = Answer(f"{NEW}.2", 1, 3, before.vectors)
    assert faults(judge(ledger, Question(ITEM, ["c"], 1), given)) == [Fault.LOST]


def test_answers_of_another_version_or_shape_are_wrong(ledger: Ledger) -> None:
    given = answer(ledger, f"{NEW}.2", 1, IDS)
    assert faults(judge(ledger, Question(ITEM, IDS, 0), given)) == [Fault.WRONG]
    assert faults(judge(ledger, Question(ITEM, IDS[:2] * 2, 1), given)) == [Fault.WRONG]
    off_chain = Answer(f"{NEW}.2", 2, 3, given.vectors)
    assert faults(judge(ledger, Question(ITEM, IDS, 2), off_chain)) == [Fault.WRONG]


def test_state_that_nobody_heard_of_has_no_verdict_yet(ledger: Ledger) -> None:
    for state in (f"{NEW}.3", "v3-unheard.0"):
        given = Answer(state, 1, 3, np.zeros((3, 16), np.float32))
        with pytest.raises(UnknownState, match=state.partition(".")[0]):
            judge(ledger, Question(ITEM, IDS, 1), given)


def test_errors_are_compared_with_the_state_too(ledger: Ledger) -> None:
    missing = {"type": "urn:backcast:problem:unknown-id", "snapshot": f"{NEW}.2"}
    assert judge_problem(ledger, Question(ITEM, ["c"], 1), missing) == []
    off = {
        "type": "urn:backcast:problem:version-off-chain",
        "current_version": 3,
        "servable_versions": [0, 1, 3],
    }
    assert judge_problem(ledger, Question(ITEM, IDS, 2), off) == []
    assert faults(judge_problem(ledger, Question(ITEM, IDS, 1), off) or []) == [Fault.WRONG]
    short = {**off, "servable_versions": [0, 3]}
    assert faults(judge_problem(ledger, Question(ITEM, IDS, 2), short) or []) == [Fault.WRONG]
    other = {"type": "urn:backcast:problem:internal-server-error"}
    assert judge_problem(ledger, Question(ITEM, IDS, 1), other) is None


class TestLedger:
    def test_nothing_comes_from_nowhere(self, ledger: Ledger) -> None:
        with pytest.raises(ValueError, match="was not meant"):
            ledger.add_snapshot("v1-strange", 1)
        with pytest.raises(ValueError, match="nobody meant"):
            ledger.add_delta(NEW, 3, rows(3, ["a"], 9))
        with pytest.raises(ValueError, match="nobody meant"):
            ledger.add_delta(NEW, 3, {(ITEM, "a"): None})

    def test_publication_takes_up_what_it_lacks_and_leaves_out_what_is_erased(
        self, ledger: Ledger
    ) -> None:
        ledger.will_publish(3, rows(3, ["a", "b", "e"], 2))
        ledger.add_snapshot("v3-next", 3, (NEW, 2), erased={(ITEM, "e")})
        held = ledger.everything("v3-next", 0)
        assert set(held) == {(ITEM, "a"), (ITEM, "b"), (ITEM, "d")}
        np.testing.assert_array_equal(held[ITEM, "b"], rows(3, ["a", "b", "e"], 2)[ITEM, "b"])
        np.testing.assert_array_equal(held[ITEM, "d"], rows(3, ["b", "d"], 1)[ITEM, "d"])

    def test_publication_does_not_take_up_what_was_erased_after_its_base(
        self, ledger: Ledger
    ) -> None:
        ledger.will_erase([(ITEM, "d")])
        ledger.add_delta(NEW, 3, {(ITEM, "d"): None})
        ledger.will_publish(3, rows(3, ["a"], 2))
        ledger.add_snapshot("v3-next", 3, (NEW, 2))
        assert set(ledger.everything("v3-next", 0)) == {(ITEM, "a"), (ITEM, "b")}

    def test_compaction_holds_what_was_live(self, ledger: Ledger) -> None:
        ledger.will_publish(3, None)
        ledger.add_snapshot("v3-compact", 3, (NEW, 2))
        assert set(ledger.everything("v3-compact", 0)) == {(ITEM, id) for id in "abd"}

    def test_upserts_since_a_publication_must_come_with_the_switch(self, ledger: Ledger) -> None:
        ledger.will_publish(3, rows(3, ["a", "b"], 2))
        ledger.add_snapshot("v3-next", 3, (NEW, 0))
        lived = [Span(NEW, 0, 2), Span(OLD, 0, 0)]
        missing = ledger.carried(lived, Span("v3-next", 0, 0))
        assert [(id, words) for (_, id), words in missing] == [
            ("b", "is not carried over"),
            ("d", "is not carried over"),
        ]
        ledger.add_delta("v3-next", 1, rows(3, ["b", "d"], 1))
        assert ledger.carried(lived, Span("v3-next", 0, 1)) == []

    def test_nothing_else_may_come_with_it(self, ledger: Ledger) -> None:
        ledger.will_publish(3, rows(3, ["a", "b"], 2))
        ledger.add_snapshot("v3-next", 3, (NEW, 2))
        ledger.add_delta("v3-next", 1, rows(3, ["b", "d"], 1))
        strange = ledger.carried([Span(NEW, 0, 2)], Span("v3-next", 0, 1))
        assert {words for _, words in strange} == {"is carried over for no reason"}


def test_error_is_allowed_only_while_the_part_is_away() -> None:
    absences = Absences(settle_s=1000)
    assert not absences.overlap(["store"], 0, 1e12)
    with absences.of("store"):
        assert absences.overlap(["store"], 1e11, 1e12)
        assert not absences.overlap(["database"], 0, 1e12)
    assert not absences.overlap(["store"], 0, 1)
    assert not absences.overlap(["store"], 1e11, 1e12)


def test_tally_is_clean_until_somebody_is_accused() -> None:
    tally = Tally()
    tally.verified("application/json", 3)
    assert (tally.clean, tally.requests, tally.vectors) == (True, 1, 3)
    tally.accuse([Finding(Fault.TORN, "two in one")])
    assert not tally.clean
    assert tally.examples == ["torn: two in one"]


class Serving:
    """A replica that serves one state until some time, and another from then on.

    It has no core for a share of the time.
    """

    def __init__(
        self, name: str, after: float, *, stalled: bool = False, starved: float = 0.0
    ) -> None:
        self.name, self._until, self._stalled = name, time.monotonic() + after, stalled
        self._share = starved

    def serves(self) -> str:
        if self._stalled:
            time.sleep(1.0)
        return f"{OLD}.0" if time.monotonic() < self._until else f"{NEW}.0"

    def starved(self) -> dict[str, float]:
        return {"loop": 100 + self._share * time.monotonic(), "idle": 7.0}


def test_a_replica_is_timed_from_the_switch_on_whatever_the_others_do() -> None:
    tally, stopping = Tally(), Event()
    world = SimpleNamespace(live=SimpleNamespace(generation=1, snapshot=OLD, seen_at=0.0))
    field = SimpleNamespace(
        world=world, tally=tally, stopping=stopping, absences=Absences(settle_s=0)
    )
    replicas = [Serving("quick", 0.2), Serving("late", 0.6), Serving("stalled", 0.0, stalled=True)]
    watchers = [Watcher(cast("Field", field), cast("Replica", one)) for one in replicas]
    threads = [Thread(target=watcher.run) for watcher in watchers]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert tally.converged == []  # what was live when the watch began is followed already
    world.live = SimpleNamespace(generation=2, snapshot=NEW, seen_at=time.monotonic())
    while min(watcher.followed for watcher in watchers) < 2:
        time.sleep(0.01)
    stopping.set()
    for thread in threads:
        thread.join()
    quick, late, stalled = sorted(tally.converged)
    assert quick < 0.4 < late < 0.9 < stalled
    assert tally.clean


def test_a_replica_that_was_disturbed_is_not_timed_and_one_that_was_overtaken_is() -> None:
    tally, absences = Tally(), Absences(settle_s=0)
    ago = time.monotonic() - 5
    world = SimpleNamespace(live=SimpleNamespace(generation=1, snapshot=OLD, seen_at=ago))
    field = SimpleNamespace(world=world, tally=tally, absences=absences, stopping=Event())
    watcher = Watcher(cast("Field", field), cast("Replica", Serving("slow", 1000)))
    thread = Thread(target=watcher.run)
    thread.start()
    for generation in (2, 3):
        time.sleep(0.1)
        world.live = SimpleNamespace(generation=generation, snapshot=NEW, seen_at=ago)
    time.sleep(0.1)
    with absences.of("slow"):
        time.sleep(0.1)
        assert watcher.followed == 3
    field.stopping.set()
    thread.join()
    [overtaken] = tally.converged
    assert 5 < overtaken < 6
    assert tally.faults == {Fault.LATE: 1}


@pytest.mark.parametrize(("starved", "faults"), [(0.0, {Fault.LATE: 1}), (0.95, {})])
def test_a_replica_is_late_after_the_bound_unless_it_had_no_core(
    starved: float, faults: dict[Fault, int]
) -> None:
    tally = Tally()
    world = SimpleNamespace(live=SimpleNamespace(generation=1, snapshot=OLD, seen_at=0.0))
    field = SimpleNamespace(
        world=world, tally=tally, absences=Absences(settle_s=0), stopping=Event()
    )
    replica = Serving("slow", CONVERGED_S + 0.3, starved=starved)
    watcher = Watcher(cast("Field", field), cast("Replica", replica))
    thread = Thread(target=watcher.run)
    thread.start()
    time.sleep(0.1)
    world.live = SimpleNamespace(generation=2, snapshot=NEW, seen_at=time.monotonic())
    while watcher.followed < 2:
        time.sleep(0.01)
    field.stopping.set()
    thread.join()
    [seconds] = tally.converged
    assert CONVERGED_S < seconds < CONVERGED_S + 1
    assert tally.faults == faults
    assert all("slow followed v3-new after 2." in text for text in tally.examples)


def test_a_replica_says_how_long_it_had_no_core(tmp_path: Path) -> None:
    """Two processes that want the same core: each waits about half of the time."""
    replica = Replica(0, os.environ, tmp_path)
    assert replica.starved() == {}
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nos.fork()\nwhile True: pass"
    replica._command = [sys.executable, "-c", spin]
    replica.start()
    try:
        deadline = time.monotonic() + 10
        while max(replica.starved().values(), default=0.0) < 0.2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        replica.kill()
    assert replica.starved() == {}


def test_what_never_came_about_is_named() -> None:
    tally, plan = Tally(), Plan(300, "", "", outages={"store": Outage(int, int)})
    for what in left_out(tally, plan):
        kind = what.partition(": ")[2]
        for counter in (tally.answers, tally.injected, tally.switches, tally.changes):
            tally.count(counter, kind)
    tally.followed(0.1)
    assert left_out(tally, plan) == []
    del tally.injected["stop of the store"], tally.switches["rollback"]
    assert left_out(tally, plan) == ["fault injected: stop of the store", "switch: rollback"]
