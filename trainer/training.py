"""Train the next version and register it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from backcast.alignment import AlignmentLoss, BackwardTransformation, alignment_gram
from backcast.artifacts import Artifacts
from backcast.chains import load_chain
from backcast.devices import choose_device
from backcast.errors import Conflict, InvalidInput, UnknownVersion
from backcast.lifecycle import backward_map, register_version
from backcast.registry import Catalog, Registry, VersionDraft
from backcast.versions import Lineage, Version, VersionState
from trainer.archive import ArchivedModel, library_versions, load_model, version_files
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.features import Vocabulary
from trainer.fitting import FitResult, JointAlignment, OnEpoch, Selection, fit
from trainer.graph import Graph
from trainer.model import GraphSAGE, embed
from trainer.split import Holdout, Split, make_split

BC_ALIGNER = "bc-aligner"
INTENDED_ONLY = "intended-only"
# The number is not final until the row is written: another trainer may take it meanwhile.
_REGISTRY_ONLY = {"number", "folder", "files", "transforms"}
_UNFIT_PARENTS = {VersionState.ROLLED_BACK, VersionState.REJECTED, VersionState.RETIRED}


@dataclass(frozen=True)
class TrainRequest:
    """What to train: on which data, up to when, against which parent.

    Attributes:
        until: timestamp up to which interactions are used.
        horizon: timestamp up to which the result is measured, None for no such measurement.
        parent: version to be compatible with, None for the newest fit one.
    """

    dataset: Dataset
    config: TrainConfig
    until: int
    horizon: int | None = None
    parent: int | None = None


def train_version(
    registry: Registry, artifacts: Artifacts, request: TrainRequest, on_epoch: OnEpoch
) -> Version:
    """Train the next version and register it with its map; nothing is written before the end.

    Version 0 is trained on the intended task alone, each later one with BC-Aligner: M_k and W_k
    jointly, the parent and all older maps frozen.

    Raises:
        UnknownVersion: the parent does not exist. Conflict: it is rolled back or retired.
        InvalidInput: the data does not allow the split. ArtifactError: the parent is damaged.
    """
    if request.horizon is not None and request.horizon <= request.until:
        raise InvalidInput(
            f"The horizon {request.horizon} is not after the cut-off {request.until}: "
            "there is nothing to measure on. Give a later --horizon."
        )
    artifacts.check_writable()
    catalog = registry.deployments.catalog()
    parent = choose_parent(catalog, request.parent)
    number = registry.versions.next_number()
    config, device = request.config, choose_device(request.config.device)
    split = make_split(request.dataset, request.until, request.horizon, config.protocol)
    vocabulary = Vocabulary.of(request.dataset, split.items, config.min_value_count)
    graph = Graph.of(request.dataset, split.train, split.users, split.items, vocabulary).to(device)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = GraphSAGE(config.width(number), config.depth(number), vocabulary.sizes).to(device)
        joint = None
        if parent is not None:
            target = _parent_vectors(artifacts, parent, request.dataset, split, device)
            joint = _joint_alignment(catalog, artifacts, parent, model.width, target)

    selection = _selection(split.selection, request.dataset, vocabulary, device)
    result = fit(
        model, graph, split.train, config, joint=joint, selection=selection, on_epoch=on_epoch
    )
    test = _selection(split.test, request.dataset, vocabulary, device)
    metrics = {
        **_metrics(result, model, joint, graph),
        "recall_at_50": None if test is None else test.recall(model),
    }
    trained = _Trained(number, parent, ArchivedModel(model, vocabulary), joint, metrics)
    return _register(registry, artifacts, request, trained)


def choose_parent(catalog: Catalog, wanted: int | None) -> Version | None:
    """Return the version to align to: the one asked for, else the newest fit one.

    Where a version is live, only it and its descendants are fit: training goes on from what is
    served. None means that nothing is registered yet.
    """
    by_number = {v.number: v for v in catalog.versions}
    if wanted is not None:
        if wanted not in by_number:
            raise UnknownVersion(wanted)
        if by_number[wanted].state in _UNFIT_PARENTS:
            raise Conflict(
                f"Version {wanted} is {by_number[wanted].state} and cannot be a parent.",
                version=wanted,
            )
        return by_number[wanted]
    lineage = Lineage.of(catalog.versions)
    fit_parents = [
        v
        for v in catalog.versions
        if v.state not in _UNFIT_PARENTS
        and (catalog.live is None or catalog.live.version in lineage.chain(v.number))
    ]
    if catalog.versions and not fit_parents:
        raise Conflict("No version is fit to be a parent. Name one with --parent.")
    return max(fit_parents, key=lambda v: v.number, default=None)


def _parent_vectors(
    artifacts: Artifacts, parent: Version, dataset: Dataset, split: Split, device: torch.device
) -> Tensor:
    """Return z_{k-1}, (U + I, D_parent): the parent on version k's graph, new nodes included."""
    archived = load_model(artifacts, parent)
    graph = Graph.of(dataset, split.train, split.users, split.items, archived.vocabulary)
    return torch.cat(embed(archived.model.to(device), graph.to(device)))


def _joint_alignment(
    catalog: Catalog, artifacts: Artifacts, parent: Version, width: int, target: Tensor
) -> JointAlignment:
    older = load_chain(catalog, artifacts, parent.number).values()
    gram = alignment_gram(torch.from_numpy(older_map.weight) for older_map in older)
    return JointAlignment(
        BackwardTransformation(width, parent.dim).to(target.device),
        AlignmentLoss(gram).to(target.device),
        target,
    )


def _selection(
    holdout: Holdout | None, dataset: Dataset, vocabulary: Vocabulary, device: torch.device
) -> Selection | None:
    if holdout is None:
        return None
    graph = Graph.of(dataset, holdout.visible, holdout.users, holdout.items, vocabulary)
    return Selection(holdout, graph.to(device))


def _metrics(
    result: FitResult, model: GraphSAGE, joint: JointAlignment | None, graph: Graph
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "selected_epoch": result.epoch,
        "selection_recall_at_50": result.recall,
        "seconds": round(result.seconds, 3),
    }
    if joint is not None:
        with torch.no_grad():
            mapped = joint.transformation(torch.cat(embed(model, graph)))
        # Mean over users and items of ‖B_k(z_k) − z_{k-1}‖₂, not squared.
        metrics["alignment_error"] = float((mapped - joint.target).norm(dim=1).mean())
        metrics["parent_norm"] = float(joint.target.norm(dim=1).mean())
    return metrics


@dataclass(frozen=True, eq=False)
class _Trained:
    number: int
    parent: Version | None
    archived: ArchivedModel
    joint: JointAlignment | None
    metrics: Mapping[str, Any]


def _register(
    registry: Registry, artifacts: Artifacts, request: TrainRequest, trained: _Trained
) -> Version:
    draft = _draft(request, trained)
    about = {k: v for k, v in asdict(draft).items() if k not in _REGISTRY_ONLY}
    about.update(about.pop("details"))
    transformation = None if trained.joint is None else trained.joint.transformation
    files = version_files(trained.archived, transformation, about)
    return register_version(registry, artifacts, draft, files)


def _draft(request: TrainRequest, trained: _Trained) -> VersionDraft:
    model, parent = trained.archived.model, trained.parent
    return VersionDraft(
        number=trained.number,
        parent=None if parent is None else parent.number,
        dim=model.width,
        method=INTENDED_ONLY if parent is None else BC_ALIGNER,
        until=request.until,
        seed=request.config.seed,
        dataset=str(request.dataset.folder.resolve()),
        dataset_fingerprint=request.dataset.fingerprint,
        folder="",
        files={},
        details={
            "architecture": {"name": "GraphSAGE", "width": model.width, "layers": model.layers},
            "config": request.config.model_dump(mode="json"),
            "vocabulary_sizes": trained.archived.vocabulary.sizes,
            "horizon": request.horizon,
            "metrics": dict(trained.metrics),
            "libraries": library_versions(),
        },
        transforms=()
        if parent is None
        else (backward_map(trained.number, parent.number, parent.dim, model.width, affine=False),),
    )
