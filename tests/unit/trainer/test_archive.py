"""A model that is written and read is the same model; anything else is refused."""

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from pathlib import Path

import numpy as np
import pytest
import torch

from backcast.artifacts import Artifacts, dump_json, dump_tensors
from backcast.errors import ArtifactCorrupt, ArtifactMissing, WeightsDeleted
from backcast.lifecycle.collecting import WEIGHTS
from backcast.transforms import AffineMap
from backcast.versions import FileDigest, Version, VersionState
from tests.trainer_support import dataset_of
from trainer.archive import (
    ABOUT,
    MODEL,
    TRANSFORM,
    VOCABULARY,
    ArchivedModel,
    library_versions,
    load_model,
    map_file,
    version_files,
)
from trainer.features import Vocabulary
from trainer.graph import Graph
from trainer.model import GraphSAGE, embed
from trainer.split import Edges

pytestmark = pytest.mark.usefixtures("one_thread")

# in an order other than the alphabet's, which that of the file is
VALUES = {"tags": ("s", "t"), "brand": ("p", "q"), "colour": ("r",)}
ABOUT_IT = {"architecture": {"name": "GraphSAGE", "width": 6, "layers": 2}, "seed": 3}
DATASET = dataset_of(
    [("ann", "x", 1), ("bob", "y", 2), ("ann", "z", 3)],
    {
        "tags": {"x": ["s", "t"], "y": ["t"]},
        "brand": {"x": ["p"], "y": ["q"], "z": ["p"]},
        "colour": {"x": ["r"], "z": ["r"]},
    },
)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class Shelf:
    """One archived version, as files and as the registry would know it."""

    artifacts: Artifacts
    root: Path
    original: ArchivedModel
    files: Mapping[str, bytes]

    def register(self, files: Mapping[str, bytes]) -> Version:
        """Write ``files`` as those of a version."""
        folder = self.artifacts.new_folder("versions", "v0")
        return make_version(folder, self.artifacts.write(folder, files))

    def path(self, version: Version, name: str) -> Path:
        return self.root / version.folder / name


def make_version(folder: str, files: Mapping[str, FileDigest]) -> Version:
    return Version(
        number=0,
        parent=None,
        state=VersionState.REGISTERED,
        dim=6,
        method="intended-only",
        until=3,
        seed=3,
        dataset="by-hand",
        dataset_fingerprint="f" * 64,
        folder=folder,
        files=files,
        details={},
        created_at=datetime(2024, 1, 1, tzinfo=UTC),
    )


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    vocabulary = Vocabulary(VALUES)
    model = GraphSAGE(6, 2, vocabulary.sizes)
    model(graph_of(vocabulary))  # moves the running statistics
    original = ArchivedModel(model, vocabulary)
    return Shelf(
        Artifacts(str(tmp_path)), tmp_path, original, version_files(original, {}, ABOUT_IT)
    )


def graph_of(vocabulary: Vocabulary) -> Graph:
    return Graph.of(DATASET, Edges(DATASET.users, DATASET.items), 2, 3, vocabulary)


def vectors(archived: ArchivedModel) -> bytes:
    """Return the vectors of all nodes, bit by bit."""
    return torch.cat(embed(archived.model, graph_of(archived.vocabulary))).numpy().tobytes()


def test_a_model_read_back_gives_the_same_vectors(shelf: Shelf) -> None:
    loaded = load_model(shelf.artifacts, shelf.register(shelf.files))
    assert vectors(loaded) == vectors(shelf.original)
    assert loaded.vocabulary == shelf.original.vocabulary
    assert (loaded.model.width, loaded.model.layers) == (6, 2)


def test_a_model_read_back_is_frozen_in_evaluation_mode(shelf: Shelf) -> None:
    model = load_model(shelf.artifacts, shelf.register(shelf.files)).model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reading_a_model_leaves_the_global_generator_alone(shelf: Shelf) -> None:
    version = shelf.register(shelf.files)
    before = torch.get_rng_state()
    load_model(shelf.artifacts, version)
    assert torch.equal(torch.get_rng_state(), before)


def test_files_are_named_as_documented(shelf: Shelf) -> None:
    assert sorted(shelf.files) == ["model.safetensors", "version.json", "vocabulary.json"]
    names = [map_file(3, direct=False), map_file(2, direct=True), map_file(0, direct=True)]
    assert names == ["transform.safetensors", "direct-2.safetensors", "direct-0.safetensors"]
    with_maps = version_files(shelf.original, dict.fromkeys(names, random_map()), ABOUT_IT)
    assert sorted(set(with_maps) - set(shelf.files)) == sorted(names)
    assert {name: with_maps[name] for name in shelf.files} == shelf.files
    assert json.loads(shelf.files[ABOUT]) == ABOUT_IT
    assert json.loads(shelf.files[VOCABULARY]) == {n: list(v) for n, v in VALUES.items()}


def random_map(seed: int = 0, *, bias: bool = False) -> AffineMap:
    """Return a map from 6 to 4 whose numbers need more than float32."""
    rng = np.random.default_rng(seed)
    return AffineMap(rng.normal(size=(4, 6)), rng.normal(size=4) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_maps_are_written_in_float32_each_to_its_file(shelf: Shelf, bias: bool) -> None:
    maps = {map_file(at, direct=at > 0): random_map(at, bias=bias) for at in range(3)}
    version = shelf.register(version_files(shelf.original, maps, ABOUT_IT))
    for name, original in maps.items():
        digest = version.files[name].sha256
        arrays = shelf.artifacts.read_tensors(version.folder, name, digest)
        assert sorted(arrays) == (["bias", "weight"] if bias else ["weight"])
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
        assert np.array_equal(arrays["weight"], original.weight.astype(np.float32))
        assert not np.array_equal(arrays["weight"], original.weight)
        if original.bias is not None:
            assert np.array_equal(arrays["bias"], original.bias.astype(np.float32))


def test_a_trained_map_is_written_bit_by_bit(shelf: Shelf) -> None:
    trained = torch.randn(4, 6)
    files = version_files(shelf.original, {TRANSFORM: AffineMap(trained.numpy())}, ABOUT_IT)
    version = shelf.register(files)
    digest = version.files[TRANSFORM].sha256
    arrays = shelf.artifacts.read_tensors(version.folder, TRANSFORM, digest)
    assert arrays["weight"].tobytes() == trained.numpy().tobytes()


NEEDED = pytest.mark.parametrize("name", [MODEL, VOCABULARY, ABOUT])


@NEEDED
@pytest.mark.parametrize("at", [0, -1], ids=["first byte", "last byte"])
def test_a_changed_file_is_refused(shelf: Shelf, name: str, at: int) -> None:
    version = shelf.register(shelf.files)
    content = bytearray(shelf.path(version, name).read_bytes())
    content[at] ^= 1
    shelf.path(version, name).write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match=rf"{name} is refused: its SHA-256 is"):
        load_model(shelf.artifacts, version)


@NEEDED
def test_a_file_cut_short_is_refused(shelf: Shelf, name: str) -> None:
    version = shelf.register(shelf.files)
    content = shelf.path(version, name).read_bytes()
    shelf.path(version, name).write_bytes(content[:-1])
    with pytest.raises(ArtifactCorrupt, match=name):
        load_model(shelf.artifacts, version)


@NEEDED
def test_a_file_that_is_gone_is_named(shelf: Shelf, name: str) -> None:
    version = shelf.register(shelf.files)
    shelf.path(version, name).unlink()
    with pytest.raises(ArtifactMissing, match=name):
        load_model(shelf.artifacts, version)


@NEEDED
def test_a_version_without_the_file_is_refused(shelf: Shelf, name: str) -> None:
    version = shelf.register({n: content for n, content in shelf.files.items() if n != name})
    with pytest.raises(ArtifactMissing, match=name):
        load_model(shelf.artifacts, version)


def test_weights_that_were_deleted_by_policy_are_said_to_be(shelf: Shelf) -> None:
    deleted = replace(
        shelf.register(shelf.files), weights_deleted_at=datetime(2026, 3, 1, tzinfo=UTC)
    )
    message = "The weights of version 0 were deleted on 2026-03-01, as BACKCAST_KEEP_MODELS=fit"
    with pytest.raises(WeightsDeleted, match=message):
        load_model(shelf.artifacts, deleted)
    assert issubclass(WeightsDeleted, ArtifactMissing)  # training goes on without a direct map


def test_the_collector_deletes_the_weights_and_no_other_file() -> None:
    assert WEIGHTS == MODEL


class Canary:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._path,)


@NEEDED
def test_nothing_is_ever_unpickled(shelf: Shelf, name: str) -> None:
    sprung = shelf.root / "sprung"
    version = shelf.register({**shelf.files, name: pickle.dumps(Canary(sprung))})
    with pytest.raises(ArtifactCorrupt, match=name):
        load_model(shelf.artifacts, version)
    assert not sprung.exists()


def test_a_torch_checkpoint_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    torch.save(shelf.original.model.state_dict(), tmp_path / "model.pt")
    version = shelf.register({**shelf.files, MODEL: (tmp_path / "model.pt").read_bytes()})
    with pytest.raises(ArtifactCorrupt, match="not safetensors"):
        load_model(shelf.artifacts, version)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ({"width": 7, "layers": 2}, "size mismatch for user"),
        ({"width": 6, "layers": 3}, r"Missing key.*convolutions\.2"),
        ({"width": 6, "layers": 1}, r"Unexpected key.*convolutions\.1"),
    ],
    ids=["wider", "deeper", "flatter"],
)
def test_weights_of_another_architecture_are_refused(
    shelf: Shelf, architecture: dict[str, int], reason: str
) -> None:
    about = dump_json({**ABOUT_IT, "architecture": architecture})
    version = shelf.register({**shelf.files, ABOUT: about})
    with pytest.raises(ArtifactCorrupt, match=f"{MODEL} is refused: {reason}"):
        load_model(shelf.artifacts, version)


def test_weights_of_another_vocabulary_are_refused(shelf: Shelf) -> None:
    document = dump_json({**VALUES, "brand": ["p", "q", "new"]})
    version = shelf.register({**shelf.files, VOCABULARY: document})
    with pytest.raises(ArtifactCorrupt, match="size mismatch for attributes"):
        load_model(shelf.artifacts, version)


def test_missing_weights_are_refused(shelf: Shelf) -> None:
    state = {n: t.numpy() for n, t in shelf.original.model.state_dict().items() if n != "user"}
    version = shelf.register({**shelf.files, MODEL: dump_tensors(state)})
    with pytest.raises(ArtifactCorrupt, match=r'Missing key.*"user"'):
        load_model(shelf.artifacts, version)


@pytest.mark.parametrize("about", [{}, {"architecture": {"width": 6}}, [], {"architecture": None}])
def test_a_version_that_describes_no_model_is_refused(shelf: Shelf, about: object) -> None:
    version = shelf.register({**shelf.files, ABOUT: dump_json(about)})
    with pytest.raises(ArtifactCorrupt, match=f"{ABOUT} is refused: it describes no GraphSAGE"):
        load_model(shelf.artifacts, version)


def test_libraries_are_those_installed() -> None:
    assert library_versions() == {
        name: library_version(name) for name in ("torch", "torch-geometric", "numpy", "backcast")
    }
