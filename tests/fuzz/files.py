"""Files of artifacts, snapshots, deltas, vectors and data sets, as a careless hand left them.

Readers of artifacts are tried with the digest that the bytes have: whoever published them was
careless, or worse. With another digest nothing is looked at, which has tests of its own.
"""

import gzip
import hashlib
import io
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from backcast.artifacts import Artifacts, dump_json, dump_tensors
from backcast.chains import load_map
from backcast.changes import Delta, read_delta, write_delta
from backcast.registry.database import utc_now
from backcast.snapshots import read_ids, read_snapshot, write_snapshot
from backcast.transforms import AffineMap
from backcast.vector_files import read_vector_file
from backcast.vectors import VectorBatch
from backcast.versions import (
    DeltaRecord,
    Entity,
    FileDigest,
    SnapshotRecord,
    Transform,
    Version,
    VersionState,
)
from tests.fuzz.target import Read, Target
from tests.support import normal
from trainer.archive import ABOUT, MODEL, VOCABULARY, ArchivedModel, load_model, version_files
from trainer.data.amazon import AmazonSource, import_amazon
from trainer.data.csv import CsvSource, import_csv
from trainer.data.dataset import INTERACTIONS_FILE, ITEMS_FILE, MANIFEST_FILE, Dataset
from trainer.features import Vocabulary
from trainer.model import GraphSAGE

_DIM = 4
_VECTORS = VectorBatch(
    Entity.ITEM,
    [f"item {n}" for n in range(3)],
    normal(np.random.default_rng(0), 3, _DIM),
)


class _Place:
    """Artifacts with one folder, whose files are exchanged for other contents again and again."""

    def __init__(self, folder: Path) -> None:
        self.artifacts = Artifacts(str(folder))
        self.folder = folder / "here"
        self.folder.mkdir()

    def put(self, name: str, content: bytes) -> FileDigest:
        """Exchange a file."""
        (self.folder / name).write_bytes(content)
        return FileDigest(len(content), hashlib.sha256(content).hexdigest())


class _Deadly:
    """Whoever unpickles it is killed, which nobody can overlook."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


def pickles() -> list[bytes]:
    """Return a pickle, a checkpoint of torch and an archive of NumPy that kill who unpickles."""
    checkpoint = io.BytesIO()
    torch.save({"weight": torch.ones(2, _DIM), "bias": _Deadly()}, checkpoint)
    npz = io.BytesIO()
    np.savez(npz, weight=np.array([_Deadly()], object))
    return [pickle.dumps(_Deadly()), checkpoint.getvalue(), npz.getvalue()]


def _header(entries: object, length: int | None = None) -> bytes:
    """Return a safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else orjson.dumps(entries)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64)


def _tensor(start: int, stop: int, kind: str = "F32", shape: Sequence[int] = (2, 4)) -> Any:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}


def _maps() -> list[bytes]:
    weight = np.ones((2, _DIM), np.float32)
    whole = _tensor(0, 32)
    odd_kinds = ("BF16", "F16", "F8_E4M3", "F8_E5M2", "I8", "U64", "BOOL", "F64", "C64", "F4")
    return [
        dump_tensors({"weight": weight}),
        dump_tensors({"weight": weight, "bias": np.ones(2, np.float32)}),
        dump_tensors({"weight": np.full((2, _DIM), np.nan, np.float32)}),
        dump_tensors({"weight": np.full((2, _DIM), 0x7FBFFFFF, np.uint32).view(np.float32)}),
        dump_tensors({"weight": weight.astype(np.float64)}),
        _header({"weight": _tensor(0, 64, "C64")}),
        _header({"weight": _tensor(0, 8, "I8")}),
        _header({"weight": whole}, 2**63 - 1),
        _header({"weight": whole}, 2**40),
        _header({"weight": whole, "bias": _tensor(16, 48)}),
        _header(b'{"weight":' + orjson.dumps(whole) + b',"weight":' + orjson.dumps(whole) + b"}"),
        _header({"weight": _tensor(0, 32, "F32", (2**32, 2**32))}),
        _header({"weight": _tensor(0, 0, "F32", (0, 4))}),
        _header({"weight": _tensor(0, 2**62)}),
        _header(b"[" * 100_000),
        *(_header({"weight": _tensor(0, 32, kind, (32,))}) for kind in odd_kinds),
        *pickles(),
    ]


def _read_map(folder: Path) -> Read:
    place = _Place(folder)
    transform = Transform(1, 0, False, 2, _DIM, False, "transform.safetensors")

    def read(content: bytes) -> None:
        digest = place.put(transform.file, content)
        load_map(place.artifacts, _version({transform.file: digest}), transform)

    return read


def _version(files: dict[str, FileDigest]) -> Version:
    return Version(
        number=1,
        parent=0,
        state=VersionState.REGISTERED,
        dim=_DIM,
        method="bc-aligner",
        until=1,
        seed=0,
        dataset="d",
        dataset_fingerprint="f",
        folder="here",
        files=files,
        details={},
        created_at=utc_now(),
    )


def _model_files() -> dict[str, bytes]:
    vocabulary = Vocabulary({"brand": ("acme", "other")})
    archived = ArchivedModel(GraphSAGE(_DIM, 2, vocabulary.sizes), vocabulary)
    about = {"architecture": {"width": _DIM, "layers": 2}}
    return version_files(archived, {"transform.safetensors": AffineMap.identity(_DIM)}, about)


def _model_seeds(name: str) -> list[bytes]:
    json = [
        b"[" * 100_000,
        b"null",
        b"[]",
        b'{"brand": 7}',
        b'{"brand": [7, null]}',
        b'{"brand": {"a": 1}}',
        b'{"architecture": {"width": 1000000000, "layers": 2}}',
        b'{"architecture": {"width": 4, "layers": 1000000000}}',
        b'{"architecture": {"width": -1, "layers": "two"}}',
        b'{"architecture": {"width": 4.5, "layers": null}}',
        b'{"architecture": {"width": NaN}}',
    ]
    return [_model_files()[name], *(_maps() if name == MODEL else json)]


def _read_model(name: str) -> Callable[[Path], Read]:
    def prepare(folder: Path) -> Read:
        place = _Place(folder)
        digests = {each: place.put(each, content) for each, content in _model_files().items()}

        def read(content: bytes) -> None:
            load_model(place.artifacts, _version({**digests, name: place.put(name, content)}))

        return read

    return prepare


def _parquet(columns: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def _parquets() -> list[bytes]:
    ids = pa.array(_VECTORS.ids, pa.string())
    fixed = pa.list_(pa.float32(), _DIM)
    rows = pa.array(_VECTORS.vectors.tolist(), fixed)
    entity = pa.array(["item"] * 3)

    def table(**changed: Any) -> dict[str, Any]:
        return {"entity": entity, "id": ids, "vector": rows, **changed}

    loose = pa.list_(pa.float32())
    return [
        _parquet(table()),
        _parquet(table(), compression="zstd"),
        _parquet(table(), row_group_size=1),
        _parquet(table(), use_dictionary=False, data_page_version="2.0"),
        _parquet({"id": ids, "vector": rows}, version="1.0", compression="gzip"),
        _parquet(table(entity=pa.array(["item", "user", "user"]))),
        _parquet(table(entity=pa.array(["item", None, "planet"]))),
        _parquet(table(id=pa.array(["a", "a", "a"]))),
        _parquet(table(id=pa.array(["a", None, ""]))),
        _parquet(table(id=pa.array(["x" * 100_000] * 3))),
        _parquet(table(id=pa.array([1, 2, 3]))),
        _parquet(table(vector=pa.array([[1, 2, 3, 4], None, [1, 2, 3, 4]], fixed))),
        _parquet(table(vector=pa.array([[1, None, 3, 4]] * 3, fixed))),
        _parquet(table(vector=pa.array([[1, 2], [], [1, 2]], loose))),
        _parquet(table(vector=pa.array([[1, 2]] * 3, loose))),
        _parquet(table(vector=pa.array([[float("nan")] * _DIM] * 3, fixed))),
        _parquet(table(vector=pa.array([[1, 2, 3, 4]] * 3, pa.list_(pa.float64(), _DIM)))),
        _parquet(table(vector=pa.array([[1, 2, 3, 4]] * 3, pa.list_(pa.int8(), _DIM)))),
        _parquet({"other": ids}),
        *pickles(),
    ]


def _arrow_file(columns: Any, **options: Any) -> bytes:
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _vector_files() -> list[bytes]:
    rows = pa.array(_VECTORS.vectors.tolist(), pa.list_(pa.float32()))
    columns = {"id": pa.array(_VECTORS.ids), "vector": rows}
    dictionary = {**columns, "id": pa.array(_VECTORS.ids).dictionary_encode()}
    named = pa.table(columns).replace_schema_metadata({"version": "-1e9"})
    return [
        _arrow_file(columns),
        _arrow_file(columns, compression="zstd"),
        _arrow_file(dictionary),
        _arrow_file(
            pa.table(columns)
            .cast(pa.schema([("id", pa.large_string()), ("vector", pa.large_list(pa.float64()))]))
            .to_pydict()
        ),
        _parquet(named.to_pydict()),
        _parquet({name: named[name] for name in named.column_names}),
        *_parquets(),
    ]


def _read_vector_file(folder: Path) -> Read:
    path = folder / "vectors"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_vector_file(path, Entity.ITEM, 100)

    return read


def _read_delta(folder: Path) -> Read:
    place = _Place(folder)
    draft = write_delta(place.artifacts, Delta(Entity.ITEM, _VECTORS.ids, _VECTORS.vectors), "me")
    record = DeltaRecord(**vars(draft), snapshot="v1", number=1, created_at=utc_now())

    def read(content: bytes) -> None:
        digest = place.put("delta.parquet", content)
        delta = read_delta(
            place.artifacts, replace(record, file="here/delta.parquet", sha256=digest.sha256)
        )
        assert len(delta.ids) == record.count
        assert delta.vectors is not None
        VectorBatch(delta.entity, delta.ids, delta.vectors)

    return read


def _snapshot(folder: Path) -> tuple[_Place, SnapshotRecord]:
    place = _Place(folder)
    record = write_snapshot(place.artifacts, 1, _DIM, [_VECTORS])
    for path in (folder / record.folder).iterdir():
        path.rename(place.folder / path.name)
    return place, replace(record, folder="here")


def _read_snapshot(folder: Path) -> Read:
    place, record = _snapshot(folder)
    manifest = orjson.loads((place.folder / "manifest.json").read_bytes())

    def read(content: bytes) -> None:
        digest = place.put("item.parquet", content)
        manifest["files"]["item"].update(size=digest.size, sha256=digest.sha256)
        changed = place.put("manifest.json", dump_json(manifest))
        _read_all(place.artifacts, replace(record, manifest_sha256=changed.sha256))

    return read


def _read_all(artifacts: Artifacts, record: SnapshotRecord) -> None:
    for _ in read_snapshot(artifacts, record):
        pass
    for _ in read_ids(artifacts, record, Entity.ITEM):
        pass


def _manifests() -> list[bytes]:
    digest = hashlib.sha256(b"").hexdigest()

    def manifest(name: Any, **changed: Any) -> Any:
        file = {"name": name, "count": 3, "size": 0, "sha256": digest}
        return {"format": 1, "version": 1, "dim": _DIM, "files": {"item": file}, **changed}

    names = ("item.parquet", "../item.parquet", "/etc/passwd", "..", "", "a\0b", 7, None, ["a"])
    return [
        *(orjson.dumps(manifest(name)) for name in names),
        orjson.dumps(manifest("item.parquet", files={})),
        orjson.dumps(manifest("item.parquet", files=[])),
        orjson.dumps(manifest("item.parquet", files={"planet": {}})),
        orjson.dumps(manifest("item.parquet", files={"item": None})),
        orjson.dumps(manifest("item.parquet", format=2)),
        orjson.dumps(manifest("item.parquet", dim="4")),
        b"[" * 100_000,
        b"[]",
        b"null",
    ]


def _read_manifest(folder: Path) -> Read:
    place, record = _snapshot(folder)

    def read(content: bytes) -> None:
        digest = place.put("manifest.json", content)
        _read_all(place.artifacts, replace(record, manifest_sha256=digest.sha256))

    return read


_INTERACTIONS = b"user_id,item_id,rating,timestamp\nu,i,5,1400000000\nv,i,,1400000001\n"
_ITEMS = b"item_id,brand\ni,acme\n"


def _tables_of_text() -> list[bytes]:
    return [
        _INTERACTIONS,
        gzip.compress(_INTERACTIONS),
        _INTERACTIONS.replace(b",", b";"),
        b'user_id,item_id,rating,timestamp\n"u","i\n",5,1e400\n',
        b"\xef\xbb\xbf" + _INTERACTIONS,
        _INTERACTIONS.decode().encode("utf-16"),
        b"user_id,user_id\n",
        b"",
    ]


def _read_csv(folder: Path) -> Read:
    path, items = folder / "interactions.csv", folder / "items.csv"
    items.write_bytes(_ITEMS)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        import_csv(CsvSource(path, items), folder / "out", name="d", overwrite=True)
        Dataset.read(folder / "out")

    return read


_REVIEWS = (
    b'{"reviewerID": "u", "asin": "i", "overall": 5.0, "unixReviewTime": 1400000000}\n'
    b"{'reviewerID': 'v', 'asin': 'i', 'overall': 4.0, 'reviewTime': '05 1, 2014'}\n"
)


def _reviews() -> list[bytes]:
    nested = b"[" * 50_000
    return [
        _REVIEWS,
        gzip.compress(_REVIEWS),
        _REVIEWS + nested + b"\n",
        b"{'a': " + nested,
        b'{"reviewerID": ' + b"9" * 10_000 + b"}\n",
        b'{"reviewerID": "u", "asin": "i", "overall": NaN, "unixReviewTime": 1e400}\n',
        b"__import__('os').system('true')\n",
    ]


def _read_amazon(folder: Path) -> Read:
    reviews, meta = folder / "reviews.json", folder / "meta.json"
    meta.write_bytes(b'{"asin": "i", "brand": "acme", "category": ["a"]}\n')

    def read(content: bytes) -> None:
        reviews.write_bytes(content)
        import_amazon(AmazonSource(reviews, meta, 1), folder / "out", name="d", overwrite=True)

    return read


def _dataset(name: str) -> Callable[[Path], Read]:
    """Exchange one of the three files; the manifest says the checksum that it has then."""

    def prepare(folder: Path) -> Read:
        _read_csv(folder)(_INTERACTIONS)
        out = folder / "out"
        manifest = orjson.loads((out / MANIFEST_FILE).read_bytes())

        def read(content: bytes) -> None:
            (out / name).write_bytes(content)
            if name != MANIFEST_FILE:
                manifest["checksums"][name] = hashlib.sha256(content).hexdigest()
                (out / MANIFEST_FILE).write_bytes(orjson.dumps(manifest))
            Dataset.read(out)

        return read

    return prepare


def _edges() -> list[bytes]:
    columns = {
        "user_id": ["u", "v"],
        "item_id": ["i", "i"],
        "rating": pa.array([5, None], pa.float32()),
        "timestamp": pa.array([1, 2], pa.int64()),
    }
    return [
        _parquet(columns),
        _parquet(columns, compression="zstd", row_group_size=1),
        _parquet({**columns, "timestamp": pa.array([2, 1], pa.int64())}),
        _parquet({**columns, "user_id": pa.array(["u", None])}),
        _parquet({**columns, "rating": ["a", "b"]}),
        _parquet({**columns, "item_id": ["unlisted", ""]}),
    ]


def _items() -> list[bytes]:
    return [
        _parquet({"item_id": ["i"], "brand": ["acme"], "tags": [["a", None, "a", ""]]}),
        _parquet({"item_id": ["i", "i"]}),
        _parquet({"item_id": ["i"], "brand": [None]}),
        _parquet({"item_id": ["i"], "brand": [7]}),
        _parquet({"brand": ["acme"]}),
    ]


def _written_manifest() -> bytes:
    """Return the manifest of the data set that ``_dataset`` makes: equal files, equal checksums."""
    with tempfile.TemporaryDirectory() as folder:
        _read_csv(Path(folder))(_INTERACTIONS)
        return (Path(folder) / "out" / MANIFEST_FILE).read_bytes()


def _dataset_manifests() -> list[bytes]:
    checksums = dict.fromkeys((INTERACTIONS_FILE, ITEMS_FILE), "0" * 64)
    about = {"format": 1, "name": "d", "counts": {}, "source": {}, "checksums": checksums}
    return [
        _written_manifest(),
        orjson.dumps(about),
        orjson.dumps({**about, "checksums": []}),
        orjson.dumps({**about, "checksums": {name: [7] for name in checksums}}),
        b"[" * 100_000,
        b"null",
        b"\xff\xfe",
        b'{"format": ' + b"9" * 5_000 + b"}",
    ]


TARGETS = (
    Target("map (safetensors)", _maps, _read_map),
    Target("model (safetensors)", lambda: _model_seeds(MODEL), _read_model(MODEL)),
    Target("version.json", lambda: _model_seeds(ABOUT), _read_model(ABOUT)),
    Target("vocabulary.json", lambda: _model_seeds(VOCABULARY), _read_model(VOCABULARY)),
    Target("snapshot (Parquet)", _parquets, _read_snapshot),
    Target("snapshot manifest", _manifests, _read_manifest),
    Target("delta (Parquet)", _parquets, _read_delta),
    Target("vector file", _vector_files, _read_vector_file),
    Target("data set manifest", _dataset_manifests, _dataset(MANIFEST_FILE)),
    Target("data set interactions", _edges, _dataset(INTERACTIONS_FILE)),
    Target("data set items", _items, _dataset(ITEMS_FILE)),
    Target("CSV", _tables_of_text, _read_csv),
    Target("Amazon reviews", _reviews, _read_amazon),
)
