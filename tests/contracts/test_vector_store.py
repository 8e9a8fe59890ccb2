"""What serving and promotion rely on, held against every vector store."""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from redis import Redis

from backcast.errors import (
    BackcastError,
    ConfigError,
    DimensionMismatch,
    InvalidInput,
    SnapshotNotLoaded,
    StoreError,
)
from backcast.settings import Settings
from backcast.stores import EmbeddedStore, Precision, StoredSnapshot, VectorStore, open_store
from backcast.vectors import MAX_ID_BYTES, VectorBatch
from backcast.versions import Entity
from tests import servers
from tests.support import Vectors, as_stored, batches, exit_codes, normal

ITEM, USER = Entity.ITEM, Entity.USER
DIM = 3

ODD_IDS = [
    *[
        "0",
        "00",
        "007",
        "7",
        "-1",
        " ",
        "  ",
        "a",
        "A",
        "a ",
        " a",
        "a\n",
        "\t",
        "\0",
        "a\0",
        "\x7f",
    ],
    *["a/b", "/", "//", "a:b", ":", "item:a", "user:a", "item", "backcast:s1", "s1", "s1:item:a"],
    *["é", "e\u0301", "ß", "ss", "日本", "😀", "\u200b", "\ufeff", "ı", "\U0010ffff"],
    *["*", "?", "[a]", "a*", "%2F", "a%2Fb", "{a}", "'", '"', "\\", "nan", "None", "null"],
    *["x" * MAX_ID_BYTES, "x" * (MAX_ID_BYTES - 1), "é" * (MAX_ID_BYTES // 2)],
]


@pytest.fixture(params=Precision)
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture(params=["embedded", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path, precision: Precision) -> Settings:
    """Settings that name an empty store: each kind at each precision."""
    redis = request.param == "redis"
    url = request.getfixturevalue("empty_redis") if redis else f"embedded:{tmp_path / 'store'}"
    return Settings(store_url=url, store_precision=precision.value)


@pytest.fixture
def store(place: Settings) -> Iterator[VectorStore]:
    opened = open_store(place)
    yield opened
    opened.close()


def connect(url: str, precision: Precision = Precision.FLOAT32) -> VectorStore:
    return open_store(Settings(store_url=url, store_precision=precision.value))


def table(ids: Iterable[str], dim: int = DIM, seed: int = 0) -> Vectors:
    named = list(ids)
    rows = normal(np.random.default_rng(seed), len(named), dim)
    return dict(zip(named, rows, strict=True))


def ones(rows: int) -> NDArray[np.float32]:
    return np.ones((rows, DIM), np.float32)


def some(seed: int = 0, dim: int = DIM) -> dict[Entity, Vectors]:
    """Items and users, of which ``both`` is one each."""
    return {
        ITEM: table([*(f"i{n}" for n in range(50)), "both"], dim, seed),
        USER: table([*(f"u{n}" for n in range(20)), "both"], dim, seed + 1000),
    }


def load(store: VectorStore, snapshot: str, vectors: Mapping[Entity, Vectors]) -> None:
    dim = len(next(iter(next(iter(vectors.values())).values())))
    counts = {entity: len(rows) for entity, rows in vectors.items()}
    store.load(snapshot, dim, counts, batches(vectors))


def check_whole(store: VectorStore, snapshot: str, vectors: Mapping[Entity, Vectors]) -> None:
    """Every vector is there, bit for bit, and no other."""
    held = store.open(snapshot)
    assert held.counts == {entity: len(rows) for entity, rows in vectors.items()}
    for entity, rows in vectors.items():
        answer = held.gather(entity, list(rows))
        assert answer.found.all()
        assert answer.vectors.dtype == np.float32
        given = np.stack(list(rows.values()))
        assert answer.vectors.tobytes() == as_stored(given, held.rounding.precision).tobytes()


def expected(
    rows: Vectors, ids: list[str], precision: Precision = Precision.FLOAT32
) -> tuple[list[bool], list[list[float]]]:
    zero: list[float] = [0.0] * DIM
    found = {id: as_stored(rows[id], precision).tolist() for id in ids if id in rows}
    return [id in rows for id in ids], [found.get(id, zero) for id in ids]


def test_vectors_come_back_in_order_with_duplicates(
    store: VectorStore, precision: Precision
) -> None:
    rows = some()
    load(store, "s1", rows)
    ids = ["i7", "i0", "nobody", "i7", "both", "u0", "i49", "nobody", "i7"]
    for asked in (ids, ids * 10):  # a few are not looked up as many are
        answer = store.open("s1").gather(ITEM, asked)
        known = expected(rows[ITEM], asked, precision)
        assert (answer.found.tolist(), answer.vectors.tolist()) == known


def test_whole_snapshot_comes_back(store: VectorStore) -> None:
    load(store, "s1", some())
    check_whole(store, "s1", some())
    assert store.open("s1").dim == DIM


def test_every_kind_of_id_finds_its_own_vector(store: VectorStore) -> None:
    rows = {ITEM: table(ODD_IDS, seed=1), USER: table(reversed(ODD_IDS), seed=2)}
    load(store, "s1", rows)
    check_whole(store, "s1", rows)
    assert store.snapshots() == ["s1"]


@pytest.mark.parametrize(
    "id", ["", "aa", "B", "a\0\0", "a/b/", "É", "x" * 5000, "\ud800", "a\ud800"]
)
def test_near_miss_finds_nothing(store: VectorStore, id: str) -> None:
    load(store, "s1", {ITEM: table(ODD_IDS)})
    for asked in (["a", id], ["a", id] * 20):
        answer = store.open("s1").gather(ITEM, asked)
        assert answer.found.tolist() == [True, False] * (len(asked) // 2)
        assert answer.vectors[1].tolist() == [0.0] * DIM


def test_one_id_of_both_kinds_has_two_vectors(store: VectorStore, precision: Precision) -> None:
    rows = some()
    load(store, "s1", rows)
    held = store.open("s1")
    for entity in Entity:
        known = as_stored(rows[entity]["both"], precision)
        assert held.gather(entity, ["both"]).vectors[0].tolist() == known.tolist()


def test_no_ids_give_no_rows(store: VectorStore) -> None:
    load(store, "s1", some())
    answer = store.open("s1").gather(ITEM, [])
    assert (answer.vectors.shape, answer.found.shape) == ((0, DIM), (0,))


def test_only_unknown_ids_give_zeros(store: VectorStore) -> None:
    load(store, "s1", some())
    answer = store.open("s1").gather(USER, ["i0", "i1"])
    assert answer.found.tolist() == [False, False]
    assert answer.vectors.tolist() == [[0.0] * DIM] * 2


@pytest.mark.parametrize("counts", [{ITEM: 2}, {ITEM: 2, USER: 0}])
def test_kind_without_vectors_knows_no_id(store: VectorStore, counts: dict[Entity, int]) -> None:
    store.load("s1", DIM, counts, batches({ITEM: table("ab")}))
    answer = store.open("s1").gather(USER, ["a", "b"])
    assert answer.found.tolist() == [False, False]
    assert answer.vectors.shape == (2, DIM)


def test_batches_may_come_in_any_cut_and_order(store: VectorStore) -> None:
    rows = {ITEM: table(str(n) for n in range(3000)), USER: table("ab", seed=1)}
    [items, users] = batches(rows)
    first, *rest = items.slices(7)
    store.load("s1", DIM, {USER: 2, ITEM: 3000}, [first, users, *rest])
    check_whole(store, "s1", rows)


def test_answer_is_the_callers_own(store: VectorStore) -> None:
    load(store, "s1", some())
    held = store.open("s1")
    before = held.gather(ITEM, ["i0", "i1"]).vectors.copy()
    held.gather(ITEM, ["i0", "i1"]).vectors[:] = 7
    assert held.gather(ITEM, ["i0", "i1"]).vectors.tolist() == before.tolist()


def test_loading_again_changes_nothing(store: VectorStore) -> None:
    load(store, "s1", some(seed=0))
    load(store, "s1", some(seed=5))
    check_whole(store, "s1", some(seed=0))


def interrupted() -> Iterator[VectorBatch]:
    yield from batches({ITEM: table("ab")})
    raise KeyboardInterrupt("Ctrl-C")


def unreadable() -> Iterator[VectorBatch]:
    yield from batches({ITEM: table("ab")})
    raise BackcastError("a file is damaged")


@pytest.mark.parametrize(
    ("counts", "refused", "error"),
    [
        ({ITEM: 3}, lambda: batches({ITEM: table("ab")}), DimensionMismatch),
        ({ITEM: 2}, lambda: batches({ITEM: table("abc")}), DimensionMismatch),
        ({ITEM: 2, USER: 1}, lambda: batches({ITEM: table("ab")}), DimensionMismatch),
        ({ITEM: 2}, lambda: batches({ITEM: table("ab"), USER: table("u")}), DimensionMismatch),
        ({ITEM: 2}, lambda: batches({ITEM: table("ab", dim=4)}), DimensionMismatch),
        ({ITEM: 3}, lambda: [VectorBatch(ITEM, ["a", "b", "a"], ones(3))], InvalidInput),
        (
            {ITEM: 3},
            lambda: [*batches({ITEM: table("ab")}), *batches({ITEM: table("b")})],
            InvalidInput,
        ),
        ({ITEM: 2}, unreadable, BackcastError),
        ({ITEM: 2}, interrupted, KeyboardInterrupt),
    ],
    ids=["few", "many", "none", "unlisted", "dim", "twice", "twice-apart", "error", "interrupt"],
)
def test_refused_load_is_never_seen_and_can_be_done_right(
    store: VectorStore,
    counts: dict[Entity, int],
    refused: Callable[[], Iterable[VectorBatch]],
    error: type[BaseException],
) -> None:
    with pytest.raises(error):
        store.load("s1", DIM, counts, refused())
    assert store.snapshots() == []
    assert error in {KeyboardInterrupt, BackcastError} or store.remains() == []
    with pytest.raises(SnapshotNotLoaded):
        store.open("s1")
    load(store, "s1", {ITEM: table("ab")})
    check_whole(store, "s1", {ITEM: table("ab")})
    assert not store.open("s1").gather(ITEM, ["c"]).found.any()
    assert not store.open("s1").gather(USER, ["u"]).found.any()


def test_unknown_snapshot_is_named(store: VectorStore) -> None:
    load(store, "s1", some())
    with pytest.raises(SnapshotNotLoaded, match="does not hold snapshot s2") as caught:
        store.open("s2")
    assert caught.value.data["snapshot"] == "s2"


def test_snapshots_are_listed_in_order(store: VectorStore) -> None:
    for snapshot in ("v2-b", "v10-a", "v2-a"):
        load(store, snapshot, {ITEM: table("a")})
    assert store.snapshots() == ["v10-a", "v2-a", "v2-b"]


def test_dropped_snapshot_is_gone_and_others_stay(store: VectorStore) -> None:
    for seed, snapshot in enumerate(("v1-a", "v1-ab", "v1-b")):
        load(store, snapshot, some(seed))
    store.drop("v1-a")
    store.drop("v1-a")
    store.drop("never-there")
    assert store.snapshots() == ["v1-ab", "v1-b"]
    with pytest.raises(SnapshotNotLoaded):
        store.open("v1-a")
    check_whole(store, "v1-ab", some(1))
    check_whole(store, "v1-b", some(2))


def test_dropped_snapshot_can_be_loaded_again(store: VectorStore) -> None:
    load(store, "s1", some(0))
    store.drop("s1")
    load(store, "s1", some(5))
    check_whole(store, "s1", some(5))


def test_snapshots_with_the_same_ids_are_never_mixed(
    store: VectorStore, precision: Precision
) -> None:
    wide = some(seed=9, dim=5)
    load(store, "s1", some(0))
    first = store.open("s1")
    load(store, "s2", wide)
    second = store.open("s2")
    ids = ["both", "i3", "i3"]
    for held, rows in ((first, some(0)[ITEM]), (second, wide[ITEM])):
        known = [as_stored(rows[id], precision).tolist() for id in ids]
        assert held.gather(ITEM, ids).vectors.tolist() == known
    assert (first.dim, second.dim) == (3, 5)


def test_handle_reads_on_while_others_come_and_go(store: VectorStore, precision: Precision) -> None:
    load(store, "s1", some(0))
    held = store.open("s1")
    wanted = as_stored(np.stack(list(some(0)[ITEM].values())), precision)
    stop = threading.Event()

    def read() -> int:
        reads = 0
        while not stop.is_set() or not reads:
            answer = held.gather(ITEM, list(some(0)[ITEM]))
            assert answer.found.all()
            assert np.array_equal(answer.vectors, wanted)
            reads += 1
        return reads

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for seed in range(3):
            load(store, "s2", some(seed))
            store.drop("s2")
        stop.set()
        assert all(reader.result() for reader in readers)


def test_snapshot_is_seen_whole_or_not_at_all(store: VectorStore, place: Settings) -> None:
    rows = {ITEM: table(f"i{n}" for n in range(200)), USER: table("uvw", seed=1)}
    ids = [*rows[ITEM], *rows[USER]]
    readers = open_store(place)
    seen: list[bool] = []

    def look() -> bool:
        try:
            held = readers.open("s1")
        except SnapshotNotLoaded:
            return False
        assert held.gather(ITEM, ids).found.sum() == 200
        assert held.gather(USER, ids).found.sum() == 3
        return True

    def watched() -> Iterator[VectorBatch]:
        for batch in batches(rows):
            for piece in batch.slices(20):
                seen.append(look())
                yield piece
        seen.append(look())

    store.load("s1", DIM, {ITEM: 200, USER: 3}, watched())
    assert seen == [False] * 12
    assert look()
    readers.close()


def load_big(place: Settings) -> None:
    store = open_store(place)
    load(store, "s1", {ITEM: table((f"i{n}" for n in range(20_000)), seed=3)})
    store.close()


@pytest.mark.parametrize("precision", [Precision.FLOAT32], indirect=True)
def test_loaders_of_one_snapshot_do_not_harm_each_other(
    store: VectorStore, place: Settings
) -> None:
    assert exit_codes(load_big, *[(place,)] * 3) == [0, 0, 0]
    assert store.snapshots() == ["s1"]
    check_whole(store, "s1", {ITEM: table((f"i{n}" for n in range(20_000)), seed=3)})


def test_threads_may_load_different_snapshots_at_once(store: VectorStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: load(store, f"s{seed}", some(seed)), range(4)))
    assert store.snapshots() == ["s0", "s1", "s2", "s3"]
    for seed in range(4):
        check_whole(store, f"s{seed}", some(seed))


def load_and_die(place: Settings) -> None:
    def fatal() -> Iterator[VectorBatch]:
        yield from VectorBatch(ITEM, [f"{n}" for n in range(5000)], ones(5000)).slices(500)
        os.kill(os.getpid(), signal.SIGKILL)

    open_store(place).load("s1", DIM, {ITEM: 5001}, fatal())


@pytest.mark.parametrize("precision", [Precision.FLOAT32], indirect=True)
def test_killed_load_is_never_seen_and_can_be_done_again(
    store: VectorStore, place: Settings
) -> None:
    load(store, "s0", some(0))
    assert exit_codes(load_and_die, (place,)) == [-signal.SIGKILL]
    assert store.snapshots() == ["s0"]
    assert store.remains() == ["s1"]
    with pytest.raises(SnapshotNotLoaded):
        store.open("s1")
    rows = {ITEM: table(str(n) for n in range(5001))}
    load(store, "s1", rows)
    assert store.remains() == []
    check_whole(store, "s1", rows)
    check_whole(store, "s0", some(0))


@pytest.mark.parametrize("precision", [Precision.FLOAT32], indirect=True)
def test_what_a_killed_load_left_can_be_dropped(store: VectorStore, place: Settings) -> None:
    load(store, "s0", some(0))
    assert exit_codes(load_and_die, (place,)) == [-signal.SIGKILL]
    store.drop("s1")
    assert (store.snapshots(), store.remains()) == (["s0"], [])
    check_whole(store, "s0", some(0))


def test_size_counts_vectors_and_ids(store: VectorStore, precision: Precision) -> None:
    rows = {ITEM: table((f"{n:032}" for n in range(1000)), dim=16)}
    load(store, "s1", rows)
    payload = 1000 * (16 * precision.dtype.itemsize + 32)
    assert payload < store.open("s1").size < payload + 1000 * 64


def test_rounding_is_measured(store: VectorStore, precision: Precision) -> None:
    rows = {
        ITEM: {**table((f"i{n}" for n in range(40_000)), seed=1), "zero": np.zeros(DIM, "f4")},
        USER: table("abc", seed=2),
    }
    load(store, "s1", rows)
    given = np.stack([vector for kind in rows.values() for vector in kind.values()])
    lost = as_stored(given, precision).astype(np.float64) - given
    norms = np.linalg.norm(given.astype(np.float64), axis=1)
    errors = np.linalg.norm(lost, axis=1) / np.maximum(norms, 1e-30)
    measured = store.open("s1").rounding
    assert measured.precision == precision
    np.testing.assert_allclose(measured.mean_error, errors.mean(), rtol=1e-12)
    np.testing.assert_allclose(measured.largest_error, errors.max(), rtol=1e-12)


LARGE = {
    Precision.FLOAT16: (65519.0, 65520.0, "65520, too large for float16. .*PRECISION=bfloat16"),
    Precision.BFLOAT16: (3.39e38, 3.4e38, "3.4e.38, too large for bfloat16. .*PRECISION=float32"),
}


@pytest.mark.parametrize("precision", LARGE, indirect=True)
def test_number_too_large_for_the_precision_is_refused_by_name(
    store: VectorStore, precision: Precision
) -> None:
    largest, too_large, said = LARGE[precision]
    for sign in (1, -1):
        vectors = {ITEM: {"fits": ones(1)[0] * sign * largest, "é/2": ones(1)[0]}}
        load(store, f"s{sign}", vectors)
        check_whole(store, f"s{sign}", vectors)
        vectors[ITEM]["é/2"][1] = sign * too_large
        with pytest.raises(InvalidInput, match=f"^item 'é/2' holds -?{said}"):
            load(store, "s2", vectors)
    assert store.snapshots() == ["s-1", "s1"]


def test_snapshot_keeps_the_precision_it_was_loaded_at(store: VectorStore, place: Settings) -> None:
    load(store, "s1", some())
    for other in Precision:
        changed = connect(place.store_url, other)
        load(changed, "s1", some())
        assert changed.open("s1").rounding == store.open("s1").rounding
        check_whole(changed, "s1", some())
        load(changed, f"s-{other}", some())
        assert store.open(f"s-{other}").rounding.precision == other
        check_whole(store, f"s-{other}", some())
        changed.close()
    check_whole(store, "s1", some())


def test_size_grows_with_the_snapshot(store: VectorStore) -> None:
    load(store, "small", {ITEM: table(f"{n:06}" for n in range(1000))})
    load(store, "large", {ITEM: table(f"{n:06}" for n in range(2000))})
    small, large = store.open("small").size, store.open("large").size
    assert 1.9 < large / small < 2.1


KNOWN = table(["a", "b", "aa", "é", "a/b", "0", "00"])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[list[VectorStore]]:
    """Each kind at each precision, empty but for snapshots of their own names."""
    opened = [
        connect(url, precision)
        for precision in Precision
        for url in (f"embedded:{tmp_path_factory.mktemp('store')}", redis_url)
    ]
    yield opened
    for store in opened:
        store.close()


@pytest.fixture(scope="module")
def everywhere(stores: list[VectorStore]) -> Iterator[list[StoredSnapshot]]:
    """One set of vectors in every store."""
    for at, store in enumerate(stores):
        load(store, f"known-{at}", {ITEM: KNOWN})
    yield [store.open(f"known-{at}") for at, store in enumerate(stores)]
    for at, store in enumerate(stores):
        store.drop(f"known-{at}")


@given(ids=st.lists(st.sampled_from(list(KNOWN)) | st.text(max_size=5), max_size=40))
def test_stores_give_equal_answers(everywhere: list[StoredSnapshot], ids: list[str]) -> None:
    for held in everywhere:
        answer = held.gather(ITEM, ids)
        known = expected(KNOWN, ids, held.rounding.precision)
        assert (answer.found.tolist(), answer.vectors.tolist()) == known


IDS = st.one_of(
    st.text(min_size=1, max_size=8),
    st.text(st.sampled_from("/:.%?#* "), min_size=1, max_size=6),
    st.from_regex(r"\A0*[0-9]{1,4}\Z"),
    st.text(st.characters(min_codepoint=0x10000), min_size=1, max_size=4),
    st.builds(str.__mul__, st.sampled_from(["x", "é", "日", "😀"]), st.integers(1, 256)),
)


@given(ids=st.lists(IDS, min_size=1, max_size=60, unique=True), data=st.data())
@settings(max_examples=40)
def test_ids_of_any_shape_find_their_own(
    stores: list[VectorStore], ids: list[str], data: st.DataObject
) -> None:
    asked = data.draw(st.lists(st.sampled_from(ids) | IDS, max_size=40))
    rows = table(ids)
    for store in stores:
        store.drop("shapes")
        load(store, "shapes", {ITEM: rows})
        held = store.open("shapes")
        check_whole(store, "shapes", {ITEM: rows})
        answer = held.gather(ITEM, asked)
        known = expected(rows, asked, held.rounding.precision)
        assert (answer.found.tolist(), answer.vectors.tolist()) == known
        store.drop("shapes")


class TestEmbedded:
    """What only a folder can promise, or get wrong."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "store"

    @pytest.fixture
    def store(self, folder: Path) -> EmbeddedStore:
        return EmbeddedStore(folder)

    def test_handle_stays_readable_after_the_drop(self, store: EmbeddedStore) -> None:
        load(store, "s1", some())
        held = store.open("s1")
        store.drop("s1")
        answer = held.gather(ITEM, ["both", "i3", "u0"])
        assert (answer.found.tolist(), answer.vectors.tolist()) == expected(
            some()[ITEM], ["both", "i3", "u0"]
        )

    @pytest.mark.parametrize("hashes", [1, 2, 7])
    def test_colliding_hashes_find_their_own_vectors(
        self, store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch, hashes: int
    ) -> None:
        monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda id: 2**64 - 1 - sum(id) % hashes)
        load(store, "s1", some())
        check_whole(store, "s1", some())
        held, absent = store.open("s1"), [f"x{n}" for n in range(20)]
        assert not held.gather(ITEM, absent).found.any()
        assert not any(held.gather(ITEM, [id]).found.any() for id in absent)
        for id, vector in some()[ITEM].items():
            assert held.gather(ITEM, [id]).vectors[0].tolist() == vector.tolist()

    def test_colliding_hashes_hide_no_duplicate(
        self, store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(xxhash, "xxh3_64_intdigest", len)
        ids = ["ab", "cd", "efg", "ef", "cd"]
        with pytest.raises(InvalidInput, match="The item id 'cd' comes twice"):
            store.load("s1", DIM, {ITEM: 5}, [VectorBatch(ITEM, ids, ones(5))])

    def test_litter_of_a_killed_load_goes_with_the_next(
        self, store: EmbeddedStore, folder: Path
    ) -> None:
        assert exit_codes(load_and_die, (Settings(store_url=f"embedded:{folder}"),)) == [
            -signal.SIGKILL
        ]
        assert [path.name for path in folder.iterdir() if path.is_dir()] == [".unfinished-s1"]
        load(store, "s2", some())
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["s2"]

    def test_everything_is_on_disk_before_the_snapshot_is_seen(
        self, store: EmbeddedStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        fsync, rename = os.fsync, os.rename

        def note_sync(descriptor: int) -> None:
            steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            fsync(descriptor)

        def note_rename(source: Path, target: Path) -> None:
            steps.append(f"{source.name} → {target.name}")
            rename(source, target)

        monkeypatch.setattr(os, "fsync", note_sync)
        monkeypatch.setattr(os, "rename", note_rename)
        load(store, "s1", some())
        files = {path.name for path in (folder / "s1").iterdir()}
        assert len(files) == 13
        assert set(steps[:13]) == files
        assert steps[13:] == [".unfinished-s1", ".unfinished-s1 → s1", "store"]

    def test_store_is_shared_by_its_folder(self, store: EmbeddedStore, folder: Path) -> None:
        load(store, "s1", some())
        check_whole(EmbeddedStore(folder), "s1", some())

    def test_full_disk_is_an_error_and_leaves_nothing(
        self, store: EmbeddedStore, folder: Path
    ) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(StoreError, match="too large"):
                load(store, "s1", {ITEM: table([f"i{n}" for n in range(2000)], 64, 0)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.snapshots() == []
        assert [path.name for path in folder.iterdir()] == [".lock"]

    def test_size_is_that_of_the_files(self, store: EmbeddedStore, folder: Path) -> None:
        load(store, "s1", some())
        files = sum(path.stat().st_size for path in (folder / "s1").iterdir())
        assert store.open("s1").size == files

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("manifest.json", b"{"),
            ("manifest.json", b"{}"),
            ("manifest.json", b'{"format":1,"dim":3,"counts":{}}'),
            ("item.vectors.npy", b""),
            ("item.vectors.npy", b"\x93NUMPY\x01\x00"),
            ("item.ids", b""),
            ("item.ids", b"i0i1"),
        ],
    )
    def test_unreadable_snapshot_is_an_error_of_the_store(
        self, store: EmbeddedStore, folder: Path, name: str, content: bytes
    ) -> None:
        load(store, "s1", some())
        (folder / "s1" / name).write_bytes(content)
        with pytest.raises(StoreError, match="Snapshot s1 cannot be read"):
            store.open("s1")

    def test_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StoreError, match="file/store cannot be made"):
            EmbeddedStore(tmp_path / "file" / "store")

    def test_folder_that_cannot_be_written_is_named(
        self, store: EmbeddedStore, folder: Path
    ) -> None:
        (folder / ".lock").mkdir()
        refused = pytest.raises(StoreError, match=f"{folder} cannot be changed")
        with refused:
            load(store, "s1", some())
        with refused:
            store.drop("s1")


class TestRedis:
    """What only a server can promise, or get wrong."""

    @pytest.fixture
    def store(self, empty_redis: str) -> Iterator[VectorStore]:
        opened = connect(empty_redis)
        yield opened
        opened.close()

    @pytest.fixture
    def client(self, empty_redis: str) -> Iterator[Redis]:
        with Redis.from_url(empty_redis) as client:
            yield client

    def test_values_are_raw_floats_under_keys_with_the_snapshot(
        self, store: VectorStore, client: Redis
    ) -> None:
        vectors: NDArray[np.float32] = np.array([[1, -2.5, 0], [3, 4, 5e-40]], np.float32)
        store.load("v1-x", DIM, {ITEM: 2}, [VectorBatch(ITEM, ["a:b/é", "c"], vectors)])
        beside = {b"backcast:", b"backcast:v1-x"}
        assert {key: client.get(key) for key in client.scan_iter() if key not in beside} == {
            "backcast:v1-x:item:a:b/é".encode(): bytes.fromhex("0000803f000020c000000000"),
            b"backcast:v1-x:item:c": vectors[1].astype("<f4").tobytes(),
        }

    def test_size_is_that_of_keys_and_values(self, store: VectorStore, client: Redis) -> None:
        load(store, "s1", some())
        keys = [key for key in client.scan_iter() if key not in {b"backcast:", b"backcast:s1"}]
        assert store.open("s1").size == sum(map(len, keys)) + len(keys) * DIM * 4

    def test_emptied_store_is_told_from_an_unknown_id(
        self, store: VectorStore, client: Redis
    ) -> None:
        load(store, "s1", some())
        held = store.open("s1")
        assert held.gather(ITEM, ["nobody"]).found.tolist() == [False]
        client.flushdb()
        with pytest.raises(SnapshotNotLoaded):
            held.gather(ITEM, ["i0"])

    def test_handle_fails_cleanly_after_the_drop(self, store: VectorStore) -> None:
        load(store, "s1", some())
        held = store.open("s1")
        store.drop("s1")
        with pytest.raises(SnapshotNotLoaded):
            held.gather(ITEM, ["i0", "nobody"])

    def test_vector_of_a_wrong_length_is_refused(self, store: VectorStore, client: Redis) -> None:
        load(store, "s1", some())
        client.set("backcast:s1:item:i0", b"\0" * 8)
        with pytest.raises(StoreError, match="has not 3 numbers of float32"):
            store.open("s1").gather(ITEM, ["i1", "i0"])

    def test_keys_of_others_are_left_alone(self, store: VectorStore, client: Redis) -> None:
        theirs = ["session:1", "backcast", "backcast:s1x:item:a", "other:backcast:s1:item:a"]
        for key in theirs:
            client.set(key, b"theirs")
        load(store, "s1", some())
        store.drop("s1")
        assert sorted(key.decode() for key in client.scan_iter()) == sorted(theirs)

    def test_refused_load_leaves_no_key(self, store: VectorStore, client: Redis) -> None:
        with pytest.raises(DimensionMismatch):
            store.load("s1", DIM, {ITEM: 3}, batches({ITEM: table("ab")}))
        assert client.dbsize() == 0

    @pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
    def test_server_that_evicts_is_refused(self, policy: str) -> None:
        with servers.redis(environ={}, port=servers.free_port()) as url:
            with Redis.from_url(url) as client:
                client.config_set("maxmemory-policy", policy)
            with pytest.raises(ConfigError, match=f"maxmemory-policy is {policy}, .* noeviction"):
                connect(url)

    def test_server_that_is_gone_is_named(self) -> None:
        with servers.redis(environ={}, port=servers.free_port()) as url:
            store = connect(url)
            load(store, "s1", some())
            held = store.open("s1")
        port = url.rpartition(":")[2].partition("/")[0]
        for act in (
            lambda: held.gather(ITEM, ["i0"]),
            lambda: store.open("s1"),
            store.snapshots,
            lambda: store.drop("s1"),
            lambda: load(store, "s2", some()),
            lambda: connect(url),
        ):
            with pytest.raises(StoreError, match=f"redis 127.0.0.1:{port} does not answer"):
                act()
        store.close()
