"""Train the next version and register it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from backcast.artifacts import Artifacts
from backcast.chains import load_chain
from backcast.devices import choose_device
from backcast.errors import ArtifactMissing, Conflict, InvalidInput, UnknownVersion
from backcast.lifecycle import register_version
from backcast.registry import Catalog, Registry, VersionDraft
from backcast.transforms import AffineMap
from backcast.versions import Lineage, Transform, Version, VersionState
from trainer.archive import (
    TRAINED,
    ArchivedModel,
    library_versions,
    load_model,
    map_file,
    version_files,
)
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.fitting import OnEpoch
from trainer.methods import Made, Method, make_version, methods
from trainer.split import make_split
from trainer.step import Step

INTENDED_ONLY = "intended-only"
# The number is not final until the row is written: another trainer may take it meanwhile.
_REGISTRY_ONLY = {"number", "folder", "files", "transforms"}
_UNFIT_PARENTS = {VersionState.ROLLED_BACK, VersionState.REJECTED, VersionState.RETIRED}


@dataclass(frozen=True)
class TrainRequest:
    """What to train: on which data, up to when, against which parent.

    Attributes:
        until: timestamp up to which interactions are used.
        method: how M_k and its maps come about.
        horizon: timestamp up to which the result is measured, None for no such measurement.
        parent: version to be compatible with, None for the newest fit one.
    """

    dataset: Dataset
    config: TrainConfig
    until: int
    method: Method
    horizon: int | None = None
    parent: int | None = None


def train_version(
    registry: Registry, artifacts: Artifacts, request: TrainRequest, on_epoch: OnEpoch
) -> Version:
    """Train the next version and register it with its maps; nothing is written before the end.

    The first version is trained on the intended task alone, each later one by the method asked for,
    the parent and all older maps frozen.

    Raises:
        UnknownVersion: the parent does not exist. Conflict: it is rolled back or retired.
        InvalidInput: the data does not allow the split. ArtifactError: the parent is damaged.
    """
    if request.horizon is not None and request.horizon <= request.until:
        raise InvalidInput(
            f"The horizon {request.horizon} is not after the cut-off {request.until}: "
            "there is nothing to measure on. Give a later --horizon."
        )
    if not request.method.servable:
        servable = ", ".join(name for name, known in methods().items() if known.servable)
        raise InvalidInput(
            f"{request.method.title} has no map to serve old versions through. "
            f"Train with one of {servable}."
        )
    if request.config.alignment_weight is None:
        own = {"alignment_weight": request.method.models.default_lambda}
        request = replace(request, config=request.config.model_copy(update=own))
    artifacts.check_writable()
    catalog = registry.deployments.catalog()
    parent = choose_parent(catalog, request.parent)
    step = _step(catalog, artifacts, request, parent, registry.versions.next_number(), on_epoch)
    if step.parent is not None:
        step.load(step.parent)  # so that a damaged parent is found before training, not after
    made = make_version(request.method, step)
    return _register(registry, artifacts, request, step, made)


def _step(
    catalog: Catalog,
    artifacts: Artifacts,
    request: TrainRequest,
    parent: Version | None,
    number: int,
    on_epoch: OnEpoch,
) -> Step:
    by_number = {version.number: version for version in catalog.versions}

    @cache
    def load(version: int) -> ArchivedModel | None:
        try:
            return load_model(artifacts, by_number[version])
        except ArtifactMissing:
            # The parent's model is indispensable; an older one is only good for a direct map.
            if parent is not None and version == parent.number:
                raise
            return None

    dataset, config = request.dataset, request.config
    return Step(
        number=number,
        dataset=dataset,
        split=make_split(dataset, request.until, request.horizon, config.protocol),
        config=config,
        device=choose_device(config.device),
        parent=None if parent is None else parent.number,
        ancestors=[] if parent is None else Lineage.of(catalog.versions).chain(parent.number),
        chain={} if parent is None else _trained_chain(catalog, artifacts, parent),
        load=load,
        on_epoch=on_epoch,
    )


def _trained_chain(catalog: Catalog, artifacts: Artifacts, parent: Version) -> dict[int, AffineMap]:
    """Return W_parent^j, composed of the maps as they were trained, where others are served."""
    by_number = {version.number: version for version in catalog.versions}
    kept = [
        replace(t, file=TRAINED, affine=False) if TRAINED in by_number[t.source].files else t
        for t in catalog.transforms
        if not t.direct
    ]
    return load_chain(replace(catalog, transforms=kept), artifacts, parent.number)


def choose_parent(catalog: Catalog, wanted: int | None) -> Version | None:
    """Return the version to align to: the one asked for, else the newest fit one.

    Where a version is live, only it and its descendants are fit, as long as none in between was
    rolled back: training goes on from what is served. None means that nothing is registered yet.
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
        if v.state not in _UNFIT_PARENTS and _goes_on(lineage.chain(v.number), catalog, by_number)
    ]
    if catalog.versions and not fit_parents:
        raise Conflict("No version is fit to be a parent. Name one with --parent.")
    return max(fit_parents, key=lambda v: v.number, default=None)


def _goes_on(chain: list[int], catalog: Catalog, by_number: Mapping[int, Version]) -> bool:
    """Return whether a version's chain leads to the live one, by none that was rolled back."""
    if catalog.live is None:
        return True
    if catalog.live.version not in chain:
        return False
    between = chain[: chain.index(catalog.live.version)]
    return all(by_number[j].state is not VersionState.ROLLED_BACK for j in between)


def _register(
    registry: Registry, artifacts: Artifacts, request: TrainRequest, step: Step, made: Made
) -> Version:
    draft = _draft(request, step, made)
    about = {k: v for k, v in asdict(draft).items() if k not in _REGISTRY_ONLY}
    about.update(about.pop("details"))
    maps = {t.file: made.maps[t.target] for t in draft.transforms}
    joint = made.trained.joint_map
    if joint is not None and all(joint is not served for served in made.maps.values()):
        maps[TRAINED] = AffineMap(joint.weight)  # all that the alignment loss looks at
    files = version_files(made.trained.archived, maps, about)
    return register_version(registry, artifacts, draft, files)


def _draft(request: TrainRequest, step: Step, made: Made) -> VersionDraft:
    model = made.trained.archived.model
    return VersionDraft(
        number=step.number,
        parent=step.parent,
        dim=model.width,
        method=INTENDED_ONLY if step.parent is None else request.method.name,
        until=request.until,
        seed=request.config.seed,
        dataset=str(request.dataset.folder.resolve()),
        dataset_fingerprint=request.dataset.fingerprint,
        folder="",
        files={},
        details={
            "architecture": {"name": "GraphSAGE", "width": model.width, "layers": model.layers},
            "config": request.config.model_dump(mode="json"),
            "vocabulary_sizes": made.trained.archived.vocabulary.sizes,
            "horizon": request.horizon,
            "metrics": _metrics(step, made),
            "libraries": library_versions(),
        },
        transforms=[
            _transform(step, version, found) for version, found in sorted(made.maps.items())
        ],
    )


def _transform(step: Step, target: int, found: AffineMap) -> Transform:
    direct = target != step.parent
    return Transform(
        source=step.number,
        target=target,
        direct=direct,
        rows=found.rows,
        cols=found.cols,
        affine=found.bias is not None,
        file=map_file(target, direct=direct),
    )


def _metrics(step: Step, made: Made) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "selected_epoch": made.trained.fit.epoch,
        "selection_recall_at_50": made.trained.fit.recall,
        "seconds": round(made.trained.fit.seconds, 3),
    }
    if step.parent is not None:
        parent = step.load(step.parent)
        assert parent is not None
        target = step.known_vectors_of(parent)
        mapped = made.maps[step.parent](step.known_vectors_of(made.trained.archived))
        # Mean over users and items of ‖B_k(z_k) − z_{k-1}‖₂, not squared.
        metrics["alignment_error"] = float(np.linalg.norm(mapped - target, axis=1).mean())
        metrics["parent_norm"] = float(np.linalg.norm(target, axis=1).mean())
        # On the edges that M_k is measured on: what is lost or won by taking its place.
        metrics["parent_recall_at_50"] = _recall(step, parent)
    metrics["recall_at_50"] = _recall(step, made.trained.archived)
    return metrics


def _recall(step: Step, archived: ArchivedModel) -> float | None:
    test = step.test(archived.vocabulary)
    return None if test is None else test.recall(archived.model.to(step.device))
