"""What is published is what the model says, for all that was seen, in every version."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sqlalchemy import create_engine, select

from backcast.chains import load_chain
from backcast.errors import (
    ArtifactMissing,
    BackcastError,
    Conflict,
    DataError,
    UnknownVersion,
    VersionRetired,
)
from backcast.registry import tables
from backcast.snapshots import read_snapshot
from backcast.versions import Entity, SnapshotRecord, VersionState
from tests.service_support import set_version
from tests.support import build_home
from tests.trainer_support import Workshop, open_workshop
from trainer import publishing
from trainer.archive import TRANSFORM, load_model
from trainer.data.dataset import LAST_SECOND, Dataset, MultiHot, resolve_until
from trainer.publishing import publish_version, run_model

pytestmark = pytest.mark.usefixtures("one_thread")

END = LAST_SECOND
Vectors = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def workshop(
    dataset: Dataset, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    """Three versions, trained on 40, 50 and 60 % of the edges."""
    del one_thread
    with open_workshop(tmp_path_factory.mktemp("home"), dataset) as workshop:
        for until in (0.4, 0.5, 0.6):
            workshop.train(until)
        yield workshop


def published(workshop: Workshop, record: SnapshotRecord) -> dict[Entity, Vectors]:
    """Return the vectors of a snapshot by entity kind and id."""
    found: dict[Entity, Vectors] = {Entity.USER: {}, Entity.ITEM: {}}
    for batch in read_snapshot(workshop.artifacts, record):
        found[batch.entity].update(zip(batch.ids, batch.vectors, strict=True))
    return found


def details(workshop: Workshop, record: SnapshotRecord) -> Mapping[str, Any]:
    """Return what the registry keeps of how a snapshot was made."""
    engine = create_engine(workshop.settings.registry_url)
    with engine.connect() as connection:
        wanted = select(tables.snapshots.c.details).where(tables.snapshots.c.id == record.id)
        kept: Mapping[str, Any] = connection.execute(wanted).scalar_one()
    engine.dispose()
    return kept


def publish(
    workshop: Workshop, version: int, until: float = 1.0, *, dataset: Dataset | None = None
) -> SnapshotRecord:
    chosen = dataset or workshop.dataset
    return publish_version(
        workshop.registry,
        workshop.artifacts,
        version,
        chosen,
        until=resolve_until(chosen, until),
        device="cpu",
    )


@pytest.mark.parametrize("version", [0, 1, 2])
def test_vectors_are_those_of_the_model_in_evaluation_mode(
    workshop: Workshop, version: int
) -> None:
    record = publish(workshop, version, 0.7)
    archived = load_model(workshop.artifacts, workshop.registry.versions.get(version))
    until = resolve_until(workshop.dataset, 0.7)
    graph, users, items = run_model(archived, workshop.dataset, until)
    with torch.no_grad():
        expected = archived.model.eval()(graph).numpy()

    stored = published(workshop, record)
    ids = (
        workshop.dataset.user_ids[: workshop.dataset.users_known(until)],
        workshop.dataset.item_ids[: workshop.dataset.items_known(until)],
    )
    assert list(stored[Entity.USER]) == ids[0].tolist()
    assert list(stored[Entity.ITEM]) == ids[1].tolist()
    rows = np.stack([*stored[Entity.USER].values(), *stored[Entity.ITEM].values()])
    assert rows.tobytes() == expected.tobytes()
    assert rows.tobytes() == np.concatenate([users, items]).tobytes()
    assert record.counts == {"user": len(ids[0]), "item": len(ids[1])}
    assert record.dim == rows.shape[1] == [8, 10, 12][version]


def test_what_training_never_saw_has_vectors_of_every_version(workshop: Workshop) -> None:
    dataset = workshop.dataset
    trained_until = workshop.registry.versions.get(2).until
    old_users, old_items = dataset.users_known(trained_until), dataset.items_known(trained_until)
    record = publish(workshop, 2, 1.0)
    stored = published(workshop, record)
    new = {
        Entity.USER: dataset.user_ids[old_users:].tolist(),
        Entity.ITEM: dataset.item_ids[old_items : dataset.items_known(END)].tolist(),
    }
    assert len(new[Entity.USER]) > 20
    assert len(new[Entity.ITEM]) > 5

    catalog = workshop.registry.deployments.catalog()
    composed = load_chain(catalog, workshop.artifacts, 2)
    weights = {k: read_weight(workshop, k) for k in (1, 2)}
    assert sorted(composed) == [0, 1, 2]
    for entity, ids in new.items():
        for id in ids:
            z = stored[entity][id].astype(np.float64)
            back_to_1 = weights[2] @ z
            expected = {2: z, 1: back_to_1, 0: weights[1] @ back_to_1}
            for j, vector in expected.items():
                served = composed[j](z)
                assert served.shape == ([8, 10, 12][j],)
                assert np.isfinite(served).all()
                np.testing.assert_allclose(served, vector, rtol=1e-12, atol=1e-12)
    spread = np.stack([stored[Entity.ITEM][id] for id in new[Entity.ITEM]]).std(axis=0)
    assert spread.min() > 0.01, "unseen items are told apart by edges and attributes"


def read_weight(workshop: Workshop, version: int) -> NDArray[np.float64]:
    known = workshop.registry.versions.get(version)
    digest = known.files[TRANSFORM].sha256
    arrays = workshop.artifacts.read_tensors(known.folder, TRANSFORM, digest)
    return arrays["weight"].astype(np.float64)


def test_a_refresh_follows_the_edges(workshop: Workshop) -> None:
    one, other = (published(workshop, publish(workshop, 0, until)) for until in (0.5, 0.9))
    shared = one[Entity.USER].keys() & other[Entity.USER].keys()
    assert shared == one[Entity.USER].keys() != other[Entity.USER].keys()
    moved = [
        id for id in shared if not np.array_equal(one[Entity.USER][id], other[Entity.USER][id])
    ]
    assert len(moved) > 0.9 * len(shared)


def test_details_say_what_a_snapshot_was_made_from(workshop: Workshop) -> None:
    record = publish(workshop, 1, 0.8)
    assert details(workshop, record) == {
        "dataset": str(workshop.dataset.folder.resolve()),
        "dataset_fingerprint": workshop.dataset.fingerprint,
        "until": resolve_until(workshop.dataset, 0.8),
        "unknown_attribute_values": {"brand": 0, "categories": 0},
    }


def test_unknown_values_are_ignored_and_counted(workshop: Workshop) -> None:
    dataset = workshop.dataset
    brands = dataset.attributes["brand"]
    renamed = brands.values.copy()
    renamed[::10] = "brand of tomorrow"
    strange = {**dataset.attributes, "brand": MultiHot(brands.offsets, renamed)}
    record = publish(workshop, 1, dataset=replace(dataset, attributes=strange))
    items = dataset.items_known(END)
    expected = {"brand": int((renamed[:items] == "brand of tomorrow").sum()), "categories": 0}
    assert expected["brand"] > 10
    assert details(workshop, record)["unknown_attribute_values"] == expected


def test_rows_are_reported_as_they_are_written(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_ROWS", 90)
    dataset = workshop.dataset
    until = resolve_until(dataset, 0.5)
    users, items = dataset.users_known(until), dataset.items_known(until)
    assert 90 < users < 270
    assert items < 180
    rows: list[int] = []
    record = publish_version(
        workshop.registry, workshop.artifacts, 0, dataset, until=until, on_rows=rows.append
    )
    expected = [
        *range(90, users, 90),
        users,
        *(users + done for done in range(90, items, 90)),
        users + items,
    ]
    assert rows == expected
    whole = published(workshop, publish(workshop, 0, 0.5))
    pieces = published(workshop, record)
    for entity in Entity:
        assert list(pieces[entity]) == list(whole[entity])
        stacks = [np.stack(list(found[entity].values())) for found in (pieces, whole)]
        assert stacks[0].tobytes() == stacks[1].tobytes()


def test_the_newest_snapshot_is_what_a_promotion_will_take(workshop: Workshop) -> None:
    publish(workshop, 1, 0.6)
    newest = publish(workshop, 1, 0.7)
    assert workshop.registry.snapshots.latest(1) == newest


def test_a_version_that_does_not_exist_is_refused(workshop: Workshop) -> None:
    with pytest.raises(UnknownVersion, match="Version 9"):
        publish(workshop, 9)


@pytest.mark.parametrize(
    ("state", "refusal", "said"),
    [
        (VersionState.RETIRED, VersionRetired, "Version 0 is retired"),
        (VersionState.REJECTED, Conflict, "Version 0 was rejected and cannot be promoted"),
    ],
)
def test_a_version_that_can_never_be_promoted_is_refused_before_its_model_is_read(
    dataset: Dataset,
    tmp_path: Path,
    state: VersionState,
    refusal: type[BackcastError],
    said: str,
) -> None:
    with build_home(tmp_path, dims=(4,), published=False) as home:  # it has no model to read
        set_version(home, 0, state=state)
        with pytest.raises(refusal, match=said):
            publish_version(home.backcast.registry, home.backcast.artifacts, 0, dataset, until=END)
        with pytest.raises(refusal, match=said):
            home.publish(0)


def test_data_without_a_needed_column_is_refused_and_leaves_nothing(workshop: Workshop) -> None:
    before = workshop.folders()
    bare = replace(workshop.dataset, attributes={"brand": workshop.dataset.attributes["brand"]})
    with pytest.raises(DataError, match="no column 'categories'"):
        publish(workshop, 1, dataset=bare)
    assert workshop.folders() == before


def test_a_version_of_another_trainer_is_refused(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        build_home(tmp_path_factory.mktemp("other"), dims=(4,), published=False) as home,
        pytest.raises(ArtifactMissing, match=r"vocabulary\.json"),
    ):
        publish_version(home.backcast.registry, home.backcast.artifacts, 0, dataset, until=END)
