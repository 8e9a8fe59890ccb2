"""The soak's checker finds what it is there to find, and accuses nobody of what is right."""

import numpy as np
import pytest
from numpy.typing import NDArray

from backcast.versions import Entity
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
