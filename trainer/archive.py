"""M_k and its vocabulary as artifacts of a version, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as library_version
from typing import Any

import torch
from torch import Tensor

from backcast.alignment import BackwardTransformation
from backcast.artifacts import Artifacts, dump_json, dump_tensors
from backcast.errors import ArtifactCorrupt, ArtifactMissing
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


def version_files(
    archived: ArchivedModel,
    transformation: BackwardTransformation | None,
    about: Mapping[str, Any],
) -> dict[str, bytes]:
    """Return the files of a version: weights as safetensors, the rest as JSON."""
    files = {
        MODEL: _tensors(archived.model.state_dict()),
        VOCABULARY: dump_json(archived.vocabulary.document()),
        ABOUT: dump_json(about),
    }
    if transformation is not None:
        weights = {"weight": transformation.weight}
        if transformation.bias is not None:
            weights["bias"] = transformation.bias
        files[TRANSFORM] = _tensors(weights)
    return files


def load_model(artifacts: Artifacts, version: Version) -> ArchivedModel:
    """Read M_k back.

    Raises:
        ArtifactMissing, ArtifactCorrupt: a file is gone, changed, or does not fit the version.
    """

    def digest(name: str) -> str:
        if name not in version.files:
            raise ArtifactMissing(artifacts.url(version.folder, name))
        return version.files[name].sha256

    about = artifacts.read_json(version.folder, ABOUT, digest(ABOUT))
    document = artifacts.read_json(version.folder, VOCABULARY, digest(VOCABULARY))
    arrays = artifacts.read_tensors(version.folder, MODEL, digest(MODEL))
    vocabulary = Vocabulary.from_document(document)
    try:
        architecture = about["architecture"]
        model = GraphSAGE(architecture["width"], architecture["layers"], vocabulary.sizes)
    except (KeyError, TypeError) as error:
        where = artifacts.url(version.folder, ABOUT)
        raise ArtifactCorrupt(where, "it describes no GraphSAGE") from error
    try:
        model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip().rstrip(".")
        raise ArtifactCorrupt(artifacts.url(version.folder, MODEL), reason) from error
    return ArchivedModel(model.eval().requires_grad_(False), vocabulary)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a model's numbers depend on."""
    return {name: library_version(name) for name in _LIBRARIES}


def _tensors(state: Mapping[str, Tensor]) -> bytes:
    return dump_tensors({name: t.detach().cpu().numpy() for name, t in state.items()})
