"""Chains read back from files are what was fitted, or are refused with the reason."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from backcast.artifacts import dump_tensors
from backcast.chains import load_chain, load_map
from backcast.errors import ArtifactCorrupt, ArtifactMissing
from backcast.versions import Entity, Transform, Version
from tests.support import Home, build_home

ONE = np.ones((4, 6), np.float32)
SIGNALLING = np.full((4, 6), 0x7FBFFFFF, np.uint32).view(np.float32)  # a NaN whose cast warns


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with build_home(tmp_path, (4, 6, 8, 5), bias=True, direct={3: [1]}) as home:
        yield home


def test_chain_gives_the_reference_for_every_version(home: Home) -> None:
    catalog = home.backcast.registry.deployments.catalog()
    ids = home.ids(version=3)
    z = np.stack([home.vectors[3][Entity.ITEM][id] for id in ids])
    chain = load_chain(catalog, home.backcast.artifacts, 3)
    assert sorted(chain) == [0, 1, 2, 3]
    for j, composed in chain.items():
        want = home.reference(j, ids, live=3)
        error = np.linalg.norm(composed(z) - want, axis=1)
        assert (error <= 1e-12 * (1 + np.linalg.norm(want, axis=1))).all()


def test_direct_maps_of_other_versions_are_not_read(home: Home) -> None:
    """Version 3 goes to 1 at once; version 2, an older one, still goes step by step."""
    folder = Path(home.settings.artifacts_root) / home.backcast.registry.versions.get(3).folder
    (folder / "direct-1.safetensors").unlink()
    catalog = home.backcast.registry.deployments.catalog()
    assert sorted(load_chain(catalog, home.backcast.artifacts, 2)) == [0, 1, 2]
    with pytest.raises(ArtifactMissing, match=r"direct-1\.safetensors"):
        load_chain(catalog, home.backcast.artifacts, 3)


def rewritten(home: Home, arrays: dict[str, NDArray[np.generic]]) -> tuple[Version, Transform]:
    """Give version 1 another map file, as if it had been registered so."""
    written = home.backcast.artifacts.write("elsewhere", {"t": dump_tensors(arrays)})
    version = replace(home.backcast.registry.versions.get(1), folder="elsewhere", files=written)
    return version, Transform(1, 0, False, 4, 6, affine=False, file="t")


def test_map_comes_back_in_float64(home: Home) -> None:
    loaded = load_map(home.backcast.artifacts, *rewritten(home, {"weight": ONE / 3}))
    assert loaded.weight.dtype == np.float64
    assert loaded.weight.tolist() == (ONE / 3).astype(np.float64).tolist()
    assert loaded.bias is None


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"weight": ONE, "bias": ONE[:, 0]}, r"it holds \['bias', 'weight'\], not \['weight'\]"),
        ({"matrix": ONE}, r"it holds \['matrix'\], not \['weight'\]"),
        ({"weight": ONE.T}, r"its weight is \(6, 4\), registered was \(4, 6\)"),
        ({"weight": ONE[0]}, r"weight: expected shape \(D_j, D_k\), got \(6,\)"),
        ({"weight": ONE * np.float32(np.nan)}, "NaN or infinite"),
        ({"weight": ONE * np.float32(np.inf)}, "NaN or infinite"),
        ({"weight": SIGNALLING}, "NaN or infinite"),
        ({"weight": ONE.astype(np.complex64)}, "its weight is of complex64, not of floats"),
        ({"weight": ONE.astype(np.int8)}, "its weight is of int8, not of floats"),
    ],
    ids=["bias", "name", "shape", "vector", "nan", "inf", "signalling", "complex", "whole"],
)
def test_map_that_is_not_what_was_registered_is_refused(
    home: Home, arrays: dict[str, NDArray[np.generic]], reason: str
) -> None:
    with pytest.raises(ArtifactCorrupt, match=f"elsewhere/t is refused: .*{reason}"):
        load_map(home.backcast.artifacts, *rewritten(home, arrays))


def test_missing_bias_is_refused(home: Home) -> None:
    version, described = rewritten(home, {"weight": ONE})
    with pytest.raises(ArtifactCorrupt, match=r"it holds \['weight'\], not \['bias', 'weight'\]"):
        load_map(home.backcast.artifacts, version, replace(described, affine=True))
