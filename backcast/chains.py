"""Read a version's maps back to every older version from the registry and the artifacts."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from backcast.artifacts import Artifacts
from backcast.errors import ArtifactCorrupt, BackcastError
from backcast.registry import Catalog
from backcast.transforms import AffineMap, compose
from backcast.versions import Lineage, Transform, Version


def load_chain(catalog: Catalog, artifacts: Artifacts, version: int) -> dict[int, AffineMap]:
    """Return W_version^j, composed in float64, for every j on the chain of ``version``.

    Raises:
        ArtifactMissing, ArtifactCorrupt: a map is gone, or not what was registered.
    """
    by_number = {v.number: v for v in catalog.versions}
    lineage = Lineage.of(catalog.versions)
    chain = set(lineage.chain(version))
    maps = {
        (t.source, t.target): load_map(artifacts, by_number[t.source], t)
        for t in _wanted(catalog, version)
        if t.source in chain and t.target in chain
    }
    return compose(version, by_number[version].dim, lineage, maps)


def _wanted(catalog: Catalog, version: int) -> Iterator[Transform]:
    # A direct map comes last, so that it stands where its version has a backward map as well.
    for transform in sorted(catalog.transforms, key=lambda t: t.direct):
        if not transform.direct or transform.source == version:
            yield transform


def load_map(artifacts: Artifacts, version: Version, transform: Transform) -> AffineMap:
    """Read one map and check it against its registered shape."""
    sha256 = version.files[transform.file].sha256
    arrays: Mapping[str, Any] = artifacts.read_tensors(version.folder, transform.file, sha256)
    where = artifacts.url(version.folder, transform.file)
    expected = {"weight", "bias"} if transform.affine else {"weight"}
    if set(arrays) != expected:
        raise ArtifactCorrupt(where, f"it holds {sorted(arrays)}, not {sorted(expected)}")
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise ArtifactCorrupt(where, f"its {name} is of {array.dtype}, not of floats")
    try:
        loaded = AffineMap(arrays["weight"], arrays.get("bias"))
    except BackcastError as error:
        raise ArtifactCorrupt(where, error.message) from error
    if (loaded.rows, loaded.cols) != (transform.rows, transform.cols):
        raise ArtifactCorrupt(
            where,
            f"its weight is ({loaded.rows}, {loaded.cols}), "
            f"registered was ({transform.rows}, {transform.cols})",
        )
    return loaded
