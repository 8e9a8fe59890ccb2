"""Files come back as they were written, or with the reason why not."""

import errno
import hashlib
import os
import pickle
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from backcast.artifacts import Artifacts, dump_json, dump_tensors
from backcast.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactMissing,
    ArtifactUnwritable,
    ConfigError,
)
from backcast.versions import FileDigest

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
TENSORS = dump_tensors({"weight": WEIGHT})


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("memory://a/b", "memory://a/b/", True),
        ("memory://a/b", "memory://a", True),
        ("memory://a/b", "memory://a/bc", False),
        ("/a/b", "/a", True),
        ("/a/b", "/a/bc", False),
        ("/a/b", "memory://a/b", False),
        ("/", "/a", True),
    ],
)
def test_places_overlap_where_one_lies_within_the_other(
    one: str, other: str, overlap: bool
) -> None:
    places = Artifacts(one), Artifacts(other)
    assert [places[0].overlaps(places[1]), places[1].overlaps(places[0])] == [overlap, overlap]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A root on two file systems, of which only the first is this host's own."""
    if request.param == "folder":
        yield str(tmp_path / "artifacts")
        return
    url = f"memory://{secrets.token_hex(4)}"
    yield url
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@pytest.fixture
def artifacts(root: str) -> Artifacts:
    return Artifacts(root)


def names(root: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(root)
    return sorted(found.removeprefix(f"{path}/") for found in fs.find(path))


def put(root: str, name: str, content: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(root)
    fs.pipe_file(f"{path}/{name}", content)


def remembered(content: bytes) -> tuple[Artifacts, str]:
    """Return artifacts in memory whose folder ``f`` holds ``content``, duly registered."""
    artifacts = Artifacts("memory://remembered")
    return artifacts, artifacts.write("f", {"t": content})["t"].sha256


def test_files_come_back(artifacts: Artifacts, root: str) -> None:
    files = {"model.safetensors": TENSORS, "version.json": b'{"seed": 3}', "empty": b""}
    written = artifacts.write("versions/v0", files)
    assert written == {name: FileDigest(len(b), sha256(b)) for name, b in files.items()}
    assert names(root) == sorted(f"versions/v0/{name}" for name in files)
    for name, content in files.items():
        assert artifacts.read("versions/v0", name, written[name].sha256) == content
        with artifacts.open("versions/v0", name, written[name].sha256) as file:
            assert file.read() == content


def test_tensors_and_json_come_back(artifacts: Artifacts) -> None:
    bias = np.array([0.5, -1.0], np.float64)
    document = {"b": [1, None], "a": "é"}
    written = artifacts.write(
        "v", {"t": dump_tensors({"weight": WEIGHT, "bias": bias}), "j": dump_json(document)}
    )
    arrays = artifacts.read_tensors("v", "t", written["t"].sha256)
    assert {name: (a.dtype.name, a.tolist()) for name, a in arrays.items()} == {
        "weight": ("float32", WEIGHT.tolist()),
        "bias": ("float64", bias.tolist()),
    }
    assert artifacts.read_json("v", "j", written["j"].sha256) == document


def test_large_file_is_written_in_pieces(artifacts: Artifacts) -> None:
    with artifacts.create("v", "large") as file:
        assert file.write(b"ab" * 700_000) == 1_400_000
        assert file.write(WEIGHT) == WEIGHT.nbytes
        assert file.tell() == 1_400_000 + WEIGHT.nbytes
    content = b"ab" * 700_000 + WEIGHT.tobytes()
    assert file.digest == FileDigest(len(content), sha256(content))
    assert artifacts.read("v", "large", file.digest.sha256) == content


def test_equal_documents_are_equal_bytes() -> None:
    assert dump_json({"a": 1, "b": 2}) == dump_json({"b": 2, "a": 1})


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:-1] + bytes([content[-1] ^ 128]),
        lambda content: bytes(len(content)),
    ],
    ids=["truncated", "emptied", "extended", "first-bit", "last-bit", "zeroed"],
)
def test_damaged_file_is_refused(
    artifacts: Artifacts, root: str, damage: Callable[[bytes], bytes]
) -> None:
    digest = artifacts.write("v", {"t": TENSORS})["t"].sha256
    put(root, "v/t", damage(TENSORS))
    refused = pytest.raises(
        ArtifactCorrupt, match=rf"v/t is refused: .*registered was {digest[:12]}"
    )
    with refused:
        artifacts.read("v", "t", digest)
    with refused:
        artifacts.read_tensors("v", "t", digest)
    with refused:
        artifacts.read_json("v", "t", digest)
    with refused, artifacts.open("v", "t", digest):
        pytest.fail("a damaged file was opened")


def test_swapped_files_are_refused(artifacts: Artifacts) -> None:
    other = dump_tensors({"weight": WEIGHT + 1})
    written = artifacts.write("v", {"a": TENSORS, "b": other})
    with pytest.raises(ArtifactCorrupt):
        artifacts.read_tensors("v", "a", written["b"].sha256)


def test_missing_file_is_named(artifacts: Artifacts, root: str) -> None:
    with pytest.raises(ArtifactMissing, match="v/t is registered but missing") as caught:
        artifacts.read("v", "t", sha256(b""))
    assert caught.value.data["url"].endswith(f"{root.rpartition('/')[2]}/v/t")
    with pytest.raises(ArtifactMissing), artifacts.open("v", "t", sha256(b"")):
        pytest.fail("a missing file was opened")


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_pickle_is_refused_and_never_opened(artifacts: Artifacts, tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    bomb = pickle.dumps(Bomb(mark))
    written = artifacts.write("v", {"transform.safetensors": bomb})
    with pytest.raises(ArtifactCorrupt, match="not safetensors"):
        artifacts.read_tensors(
            "v", "transform.safetensors", written["transform.safetensors"].sha256
        )
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # the bomb was a live one


@given(st.binary(max_size=64))
def test_bytes_that_are_no_tensors_are_refused(content: bytes) -> None:
    artifacts, digest = remembered(content)
    with pytest.raises(ArtifactCorrupt, match="not safetensors"):
        artifacts.read_tensors("f", "t", digest)


@given(st.integers(0, len(TENSORS) - 1), st.integers(0, 255))
def test_altered_tensors_are_read_or_refused(at: int, value: int) -> None:
    artifacts, digest = remembered(TENSORS[:at] + bytes([value]) + TENSORS[at + 1 :])
    with suppress(ArtifactCorrupt):
        arrays = artifacts.read_tensors("f", "t", digest)
        assert sum(array.nbytes for array in arrays.values()) == WEIGHT.nbytes


def test_numbers_that_numpy_does_not_have_are_refused() -> None:
    header = b'{"weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    artifacts, digest = remembered(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ArtifactCorrupt, match=r"not safetensors .*BF16"):
        artifacts.read_tensors("f", "t", digest)


def test_text_that_is_no_json_is_refused(artifacts: Artifacts) -> None:
    digest = artifacts.write("v", {"j": b"{'seed': 3}"})["j"].sha256
    with pytest.raises(ArtifactCorrupt, match="not JSON"):
        artifacts.read_json("v", "j", digest)


def test_folder_is_deleted_alone_and_twice(artifacts: Artifacts, root: str) -> None:
    artifacts.write("versions/v0-a", {"t": b"1", "u": b"2"})
    artifacts.write("versions/v0-ab", {"t": b"3"})
    artifacts.delete("versions/v0-a")
    artifacts.delete("versions/v0-a")
    assert names(root) == ["versions/v0-ab/t"]


class Refusing(MemoryFileSystem):  # type: ignore[misc]
    """A file system that lets nobody look or delete, as a bucket may."""

    protocol = "refusing"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    exists = rm = rm_file = find = _refuse


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda artifacts: artifacts.delete("v/a"), ArtifactUnwritable),
        (lambda artifacts: artifacts.delete_file("v/a", "t"), ArtifactUnwritable),
        (lambda artifacts: artifacts.exists("v/a", "t"), ArtifactError),
        (lambda artifacts: artifacts.size("v/a"), ArtifactError),
        (lambda artifacts: artifacts.folders(), ArtifactError),
    ],
    ids=["delete", "delete_file", "exists", "size", "folders"],
)
def test_what_may_not_be_looked_at_or_deleted_is_named(
    act: Callable[[Artifacts], object], error: type[ArtifactError]
) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(ArtifactError, match=r"^refusing://.*: Permission denied\.") as refused:
        act(Artifacts("refusing://root"))
    assert type(refused.value) is error


def test_folder_names_do_not_repeat() -> None:
    artifacts = Artifacts("memory://")
    folders = {artifacts.new_folder("versions", "v3") for _ in range(1000)}
    assert len(folders) == 1000
    assert {folder[:12] for folder in folders} == {"versions/v3-"}


def test_files_and_their_folders_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    root = tmp_path / "artifacts"
    Artifacts(str(root)).write("versions/v0", {"t": TENSORS})
    v0 = root / "versions" / "v0"
    assert synced == [str(path) for path in (v0 / "t", v0, v0.parent, root)]


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "nosuch+more://x"])
def test_unknown_file_system_is_a_setting_to_correct(url: str) -> None:
    with pytest.raises(ConfigError, match=rf"BACKCAST_ARTIFACTS_URL='{url[:6]}"):
        Artifacts(url)


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file where the root should be")
    with pytest.raises(ArtifactUnwritable, match=r"artifacts/versions/check-.* cannot be written"):
        Artifacts(str(tmp_path / "artifacts")).check_writable()


@pytest.mark.parametrize("size", [10, 10_000_000])
def test_full_disk_is_said_whether_it_shows_at_once_or_at_the_end(
    tmp_path: Path, size: int
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "big").symlink_to("/dev/full")
    with pytest.raises(ArtifactUnwritable, match="f/big cannot be written: No space left"):
        Artifacts(str(tmp_path)).write("f", {"big": bytes(size)})


def test_check_leaves_nothing_behind(artifacts: Artifacts, root: str) -> None:
    artifacts.check_writable()
    assert names(root) == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", ".."])
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    artifacts = Artifacts(str(tmp_path / "artifacts"))
    (tmp_path / "x").write_text("secret")
    with pytest.raises(ArtifactError, match="leads out"):
        artifacts.read("", name, "0" * 64)
