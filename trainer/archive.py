"""M_k and its vocabulary as artifacts of a version, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as library_version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backcast.artifacts import Artifacts, dump_json, dump_tensors
from backcast.errors import ArtifactCorrupt, ArtifactMissing, WeightsDeleted
from backcast.transforms import AffineMap
from backcast.versions import Version
from trainer.features import Vocabulary
from trainer.model import GraphSAGE

MODEL, TRANSFORM, VOCABULARY, ABOUT = (
    "model.safetensors",
    "transform.safetensors",
    "vocabulary.json",
    "version.json",
)
_LIBRARIES = ("torch", "torch-geometric", "numpy", "backcast")


@dataclass(frozen=True, eq=False)
class ArchivedModel:
    """M_k in evaluation mode, with the vocabulary it needs."""

    model: GraphSAGE
    vocabulary: Vocabulary


TRAINED = "trained.safetensors"
"""The map that was trained with M_k, where another one is served: later training looks at it."""


def map_file(version: int, *, direct: bool) -> str:
    """Return the name of the file of a map: of the one to the parent, or of a direct one."""
    return f"direct-{version}.safetensors" if direct else TRANSFORM


def version_files(
    archived: ArchivedModel, maps: Mapping[str, AffineMap], about: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return the files of a version: weights and maps as safetensors, the rest as JSON.

    Maps are given by file name and stored in float32, as they are served.
    """
    files = {
        MODEL: _tensors(archived.model.state_dict()),
        VOCABULARY: dump_json(archived.vocabulary.document()),
        ABOUT: dump_json(about),
    }
    for name, found in maps.items():
        arrays = {"weight": found.weight.astype(np.float32)}
        if found.bias is not None:
            arrays["bias"] = found.bias.astype(np.float32)
        files[name] = dump_tensors(arrays)
    return files


def load_model(artifacts: Artifacts, version: Version) -> ArchivedModel:
    """Read M_k back.

    Raises:
        WeightsDeleted: by policy.
        ArtifactMissing, ArtifactCorrupt: a file is gone, changed, or does not fit the version.
    """
    if version.weights_deleted_at is not None:
        raise WeightsDeleted(version.number, f"{version.weights_deleted_at:%Y-%m-%d}")

    def digest(name: str) -> str:
        if name not in version.files:
            raise ArtifactMissing(artifacts.url(version.folder, name))
        return version.files[name].sha256

    about = artifacts.read_json(version.folder, ABOUT, digest(ABOUT))
    document = artifacts.read_json(version.folder, VOCABULARY, digest(VOCABULARY))
    arrays = artifacts.read_tensors(version.folder, MODEL, digest(MODEL))
    try:
        vocabulary = Vocabulary.from_document(document)
        sizes = vocabulary.sizes
    except (AttributeError, TypeError) as error:
        where = artifacts.url(version.folder, VOCABULARY)
        raise ArtifactCorrupt(where, "it is no vocabulary") from error
    try:
        architecture = about["architecture"]
        _demand_size(architecture["width"], architecture["layers"], arrays)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten below
            model = GraphSAGE(architecture["width"], architecture["layers"], sizes)
    except (KeyError, TypeError, ValueError) as error:
        where = artifacts.url(version.folder, ABOUT)
        raise ArtifactCorrupt(where, "it describes no GraphSAGE") from error
    try:
        model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip().rstrip(".")
        raise ArtifactCorrupt(artifacts.url(version.folder, MODEL), reason) from error
    return ArchivedModel(model.eval().requires_grad_(False), vocabulary)


def _demand_size(width: int, layers: int, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Raise ValueError where a model of this size has more numbers than the file."""
    numbers = sum(array.size for array in arrays.values())
    if width < 1 or layers < 1 or layers * width * width > numbers:
        raise ValueError(f"width {width}, {layers} layers")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a model's numbers depend on."""
    return {name: library_version(name) for name in _LIBRARIES}


def _tensors(state: Mapping[str, Tensor]) -> bytes:
    return dump_tensors({name: t.detach().cpu().numpy() for name, t in state.items()})
