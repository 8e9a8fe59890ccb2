"""What deltas amount to, against a plain dictionary; and their files."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from backcast.artifacts import Artifacts
from backcast.changes import (
    ChangedSnapshot,
    Changes,
    Delta,
    changed_batches,
    discard_delta,
    read_delta,
    write_delta,
)
from backcast.errors import ArtifactCorrupt, ArtifactMissing, InvalidInput
from backcast.registry.database import utc_now
from backcast.stores import EmbeddedStore
from backcast.vectors import VectorBatch
from backcast.versions import DeltaDraft, DeltaKind, DeltaRecord, Entity
from tests.support import batches

DIM = 2
BASE = {
    entity: {f"{n}": np.array([n, at], np.float32) for n in range(6)}
    for at, entity in enumerate(Entity)
}
IDS = [f"{n}" for n in range(9)]  # some are not in the base


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    entity = draw(st.sampled_from(list(Entity)))
    ids = draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=5, unique=True))
    if draw(st.booleans()):
        return Delta(entity, ids)
    first = draw(st.integers(100, 10_000))
    return Delta(
        entity, ids, np.arange(first, first + 2 * len(ids), dtype=np.float32).reshape(-1, 2)
    )


Model = dict[Entity, dict[str, NDArray[np.float32]]]


def modelled(changes: Sequence[Delta]) -> Model:
    model: Model = {entity: dict(rows) for entity, rows in BASE.items()}
    for delta in changes:
        for at, id in enumerate(delta.ids):
            if delta.vectors is None:
                model[delta.entity].pop(id, None)
            else:
                model[delta.entity][id] = delta.vectors[at]
    return model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedStore:
    store = EmbeddedStore(tmp_path_factory.mktemp("store"))
    store.load("s", DIM, {entity: len(rows) for entity, rows in BASE.items()}, batches(BASE))
    return store


def told_in_pieces(found: Sequence[Delta], cuts: Sequence[int]) -> Changes:
    """Take deltas up in one piece or in several, as replicas do that poll at their own times."""
    changes, numbered = Changes(), list(enumerate(found, 1))
    edges = sorted({0, len(found), *(cut % (len(found) + 1) for cut in cuts)})
    for start, stop in pairwise(edges):
        changes = changes.after(numbered[start:stop])
    return changes


@given(
    found=st.lists(deltas(), max_size=6),
    cuts=st.lists(st.integers(0, 99), max_size=3),
    asked=st.lists(st.sampled_from([*IDS, "nobody"]), max_size=12),
)
def test_changed_snapshot_answers_as_a_dictionary_would(
    store: EmbeddedStore, found: list[Delta], cuts: list[int], asked: list[str]
) -> None:
    model = modelled(found)
    snapshot = ChangedSnapshot(store.open("s"), told_in_pieces(found, cuts))
    for entity in Entity:
        answer = snapshot.gather(entity, asked)
        assert answer.found.tolist() == [id in model[entity] for id in asked]
        for id, row in zip(asked, answer.vectors, strict=True):
            assert row.tolist() == model[entity].get(id, np.zeros(DIM)).tolist()
    assert {e: n for e, n in snapshot.counts.items() if n} == {
        e: len(rows) for e, rows in model.items() if rows
    }
    assert snapshot.dim == DIM


@given(found=st.lists(deltas(), max_size=6), cuts=st.lists(st.integers(0, 99), max_size=3))
def test_streamed_vectors_are_those_of_the_dictionary(found: list[Delta], cuts: list[int]) -> None:
    model = modelled(found)
    streamed: Model = {entity: {} for entity in Entity}
    pieces = (piece for batch in batches(BASE) for piece in batch.slices(4))
    for batch in changed_batches(pieces, told_in_pieces(found, cuts)):
        assert not streamed[batch.entity].keys() & set(batch.ids)
        streamed[batch.entity].update(zip(batch.ids, batch.vectors, strict=True))
    assert {e: {id: v.tolist() for id, v in rows.items()} for e, rows in streamed.items()} == {
        e: {id: v.tolist() for id, v in rows.items()} for e, rows in model.items()
    }


@given(found=st.lists(deltas(), min_size=1, max_size=4))
def test_earlier_changes_never_change(found: list[Delta]) -> None:
    first = Changes().after([(1, found[0])])
    before = {entity: dict(places) for entity, places in first.places.items()}
    first.after(enumerate(found[1:], 2))
    assert first.places == before
    assert set(first.vectors) <= {1}


def test_no_changes_hand_the_batches_on() -> None:
    given_batches = list(batches(BASE))
    handed = list(changed_batches(given_batches, Changes()))
    assert all(a is b for a, b in zip(handed, given_batches, strict=True))


def test_an_id_twice_in_one_delta_is_refused() -> None:
    with pytest.raises(InvalidInput, match="The user 'b' comes more than once"):
        Delta(Entity.USER, ["a", "b", "b"])


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(str(tmp_path))


def record_of(draft: DeltaDraft) -> DeltaRecord:
    return DeltaRecord(
        draft.kind,
        draft.entity,
        draft.count,
        draft.file,
        draft.sha256,
        draft.actor,
        snapshot="s",
        number=1,
        created_at=utc_now(),
    )


@pytest.mark.parametrize("vectors", [None, np.array([[1, 2], [3, -0.0]], np.float32)])
def test_file_is_read_as_it_was_written(
    artifacts: Artifacts, vectors: NDArray[np.float32] | None
) -> None:
    draft = write_delta(artifacts, Delta(Entity.USER, ["a/b", "naïve\n"], vectors), "ann")
    assert (draft.entity, draft.count, draft.actor) == (Entity.USER, 2, "ann")
    assert draft.kind is (DeltaKind.ERASE if vectors is None else DeltaKind.UPSERT)
    found = read_delta(artifacts, record_of(draft))
    assert (found.entity, list(found.ids)) == (Entity.USER, ["a/b", "naïve\n"])
    if vectors is None:
        assert found.vectors is None
    else:
        assert found.vectors is not None
        assert found.vectors.tobytes() == vectors.tobytes()


def test_file_that_is_not_what_was_registered_is_refused(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    draft = write_delta(artifacts, Delta(Entity.USER, ["a"]), "ann")
    path = tmp_path / draft.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactCorrupt, match=r"delta\.parquet is refused: its SHA-256"):
        read_delta(artifacts, record_of(draft))
    discard_delta(artifacts, draft)
    assert not path.parent.exists()
    with pytest.raises(ArtifactMissing):
        read_delta(artifacts, record_of(draft))


def test_file_with_other_rows_than_were_registered_is_refused(artifacts: Artifacts) -> None:
    record = record_of(write_delta(artifacts, Delta(Entity.USER, ["a", "b"]), "ann"))
    with pytest.raises(ArtifactCorrupt, match="it holds 2 rows, not 3"):
        read_delta(artifacts, replace(record, count=3))


def test_row_group_with_fewer_rows_than_the_file_says_is_refused(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    """Parquet counts rows in the file and in each row group; Arrow believes the groups."""
    draft = write_delta(artifacts, Delta(Entity.USER, ["a", "b", "c"]), "ann")
    path = tmp_path / draft.file
    content = bytearray(path.read_bytes())
    group = content.rindex(b"\x16\x06\x26")  # a long number, 3, and before the next field but one
    content[group + 1] = 4  # 2, as Thrift writes it
    path.write_bytes(content)
    record = replace(record_of(draft), sha256=hashlib.sha256(content).hexdigest())
    assert pq.ParquetFile(path).metadata.num_rows == 3
    with pytest.raises(ArtifactCorrupt, match="it holds 2 rows, not 3"):
        read_delta(artifacts, record)


def test_large_changes_come_in_pieces() -> None:
    ids = [f"{n}" for n in range(25_000)]
    rows = np.arange(2 * len(ids), dtype=np.float32).reshape(-1, 2)
    pieces = list(Changes().after([(1, Delta(Entity.ITEM, ids, rows))]).batches())
    assert [len(piece.ids) for piece in pieces] == [10_000, 10_000, 5_000]
    assert np.concatenate([piece.vectors for piece in pieces]).tobytes() == rows.tobytes()
    assert isinstance(pieces[0], VectorBatch)
