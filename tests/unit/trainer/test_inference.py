"""Vectors of new users and items, from the live model and newer interactions."""

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from backcast.changes import ChangedSnapshot, read_changes
from backcast.errors import ArtifactMissing, Conflict
from backcast.lifecycle import Backcast, erase, open_backcast, promote, refresh, upsert
from backcast.versions import Entity
from tests.trainer_support import Workshop, open_workshop
from tests.unit.test_cli import Shell
from trainer.archive import load_model
from trainer.data.dataset import LAST_SECOND, Dataset, resolve_until
from trainer.inference import infer, only_new
from trainer.publishing import publish_version, run_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workshop(dataset: Dataset, one_thread: None, tmp_path: Path) -> Iterator[Workshop]:
    """Two versions; 1 is live, with vectors of what was seen in 60 % of the edges."""
    del one_thread
    with open_workshop(tmp_path / "home", dataset) as workshop:
        for until in (0.4, 0.5):
            workshop.train(until)
        publish_version(
            workshop.registry,
            workshop.artifacts,
            1,
            dataset,
            until=resolve_until(dataset, 0.6),
            device="cpu",
        )
        yield workshop


@pytest.fixture
def backcast(workshop: Workshop) -> Iterator[Backcast]:
    with open_backcast(workshop.settings) as backcast:
        promote(backcast, 1, actor="tests")
        yield backcast


def modelled(workshop: Workshop) -> dict[Entity, dict[str, NDArray[np.float32]]]:
    """Return what M_1 makes of all interactions."""
    archived = load_model(workshop.artifacts, workshop.registry.versions.get(1))
    _, users, items = run_model(archived, workshop.dataset, LAST_SECOND, "cpu")
    return {
        Entity.USER: dict(zip(workshop.dataset.user_ids, users, strict=False)),
        Entity.ITEM: dict(zip(workshop.dataset.item_ids, items, strict=False)),
    }


def later(workshop: Workshop) -> dict[Entity, list[str]]:
    """Return the ids that were first seen after 60 % of the edges."""
    dataset, until = workshop.dataset, resolve_until(workshop.dataset, 0.6)
    users, items = dataset.users_known(until), dataset.items_known(until)
    found = {
        Entity.USER: dataset.user_ids[users:].tolist(),
        Entity.ITEM: dataset.item_ids[items : dataset.items_known(LAST_SECOND)].tolist(),
    }
    assert all(found.values())
    return found


def ids_of(batches: Any) -> dict[Entity, list[str]]:
    return {batch.entity: list(batch.ids) for batch in batches}


def assert_modelled(batches: Any, made: Mapping[Entity, Mapping[str, NDArray[np.float32]]]) -> None:
    for batch in batches:
        for id, vector in zip(batch.ids, batch.vectors, strict=True):
            assert vector.tobytes() == made[batch.entity][id].tobytes()


def test_vectors_are_those_of_the_live_model(workshop: Workshop, backcast: Backcast) -> None:
    made = modelled(workshop)
    inferred = infer(backcast, workshop.dataset, until=LAST_SECOND, device="cpu")
    assert (inferred.version, inferred.dim) == (1, 10)
    assert ids_of(inferred.batches) == {entity: list(rows) for entity, rows in made.items()}
    assert_modelled(inferred.batches, made)
    new = only_new(backcast, inferred)
    assert ids_of(new.batches) == later(workshop)
    assert_modelled(new.batches, made)


def test_what_was_put_is_not_new_and_what_was_erased_is_not_made(
    workshop: Workshop, backcast: Backcast
) -> None:
    known, (first, second, *rest) = later(workshop)[Entity.ITEM], later(workshop)[Entity.USER]
    ones = np.ones((1, 10), np.float32)
    upsert(backcast, Entity.USER, [first], ones, actor="ann", most_changed=9)
    old = workshop.dataset.user_ids[0]
    erase(backcast, Entity.USER, [second, old], actor="ann", grace=timedelta(0))
    inferred = infer(backcast, workshop.dataset, until=LAST_SECOND, device="cpu")
    assert not {second, old} & set(ids_of(inferred.batches)[Entity.USER])
    new = ids_of(only_new(backcast, inferred).batches)
    assert new == {Entity.ITEM: known, Entity.USER: rest}


def test_interactions_end_where_it_is_told(workshop: Workshop, backcast: Backcast) -> None:
    until = resolve_until(workshop.dataset, 0.6)
    inferred = infer(backcast, workshop.dataset, until=until, device="cpu")
    assert only_new(backcast, inferred).batches == []


def test_nothing_is_live(workshop: Workshop) -> None:
    nothing = pytest.raises(Conflict, match="Nothing is live")
    with open_backcast(workshop.settings) as backcast, nothing:
        infer(backcast, workshop.dataset, until=LAST_SECOND)


def test_model_that_is_gone_is_said(workshop: Workshop, backcast: Backcast) -> None:
    version = workshop.registry.versions.get(1)
    Path(workshop.settings.artifacts_root, version.folder, "model.safetensors").unlink()
    with pytest.raises(ArtifactMissing):
        infer(backcast, workshop.dataset, until=LAST_SECOND)


def served(backcast: Backcast, entity: Entity, ids: list[str]) -> NDArray[np.float32]:
    live = backcast.registry.deployments.live()
    assert live is not None
    changes = read_changes(backcast.artifacts, backcast.registry.deltas.of(live.snapshot))
    found = ChangedSnapshot(backcast.store.open(live.snapshot), changes).gather(entity, ids)
    assert found.found.all()
    return found.vectors


def test_command(
    workshop: Workshop,
    backcast: Backcast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    made, new = modelled(workshop), later(workshop)
    monkeypatch.chdir(tmp_path)
    shell, data = Shell(workshop.settings.home, monkeypatch, capsys), workshop.dataset.folder
    nowhere = shell("infer", "--data", str(data))
    assert nowhere.code == 1
    assert "--out FILE, --upsert, or both" in nowhere.log
    counts = f"{len(new[Entity.USER])} users, {len(new[Entity.ITEM])} items"

    written = shell("infer", "--data", str(data), "--out", "new.parquet")
    assert written.output == (
        f"Vectors of version 1: {counts}.\nNext: backcast upsert new.parquet\n"
    )
    assert shell("upsert", "new.parquet").code == 0
    for entity, ids in new.items():
        wanted = np.stack([made[entity][id] for id in ids])
        assert served(backcast, entity, ids).tobytes() == wanted.tobytes()

    nothing = shell("infer", "--data", str(data), "--upsert")
    assert (nothing.code, nothing.output) == (0, "Vectors of version 1: none.\n")

    every = shell(
        *("infer", "--data", str(data), "--all", "--upsert", "--out", "all.pq", "--json"),
        *("--reason", "new model"),
    )
    assert backcast.registry.audit.recent(1)[0].reason == "new model"
    live = backcast.registry.deployments.live()
    assert live is not None
    assert json.loads(every.output) == {
        "version": 1,
        "vectors": {str(entity): len(rows) for entity, rows in made.items()},
        "snapshot": live.name,
        "out": "all.pq",
    }
    assert live.delta == 4
    assert pq.read_metadata("all.pq").num_rows == sum(map(len, made.values()))


def test_file_of_a_version_that_is_not_live_any_more_is_refused(
    workshop: Workshop,
    backcast: Backcast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = Shell(workshop.settings.home, monkeypatch, capsys)
    data = str(workshop.dataset.folder)
    assert shell("infer", "--data", data, "--out", "new.parquet").code == 0
    publish_version(
        workshop.registry, workshop.artifacts, 0, workshop.dataset, until=LAST_SECOND, device="cpu"
    )
    promote(backcast, 0, actor="tests", force=True, reason="back")
    refused = shell("upsert", "new.parquet")
    assert refused.code == 1
    assert "of version 1, live is version 0" in refused.log


def test_what_is_put_while_the_model_runs_is_newer_than_its_vectors(
    workshop: Workshop, backcast: Backcast, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, real = workshop.dataset.user_ids[0], run_model

    def run_and_put(*arguments: Any) -> Any:
        made = real(*arguments)
        ones = np.ones((1, 10), np.float32)
        upsert(backcast, Entity.USER, [put], ones, actor="ann", most_changed=9)
        return made

    monkeypatch.setattr("trainer.publishing.run_model", run_and_put)
    publish_version(
        workshop.registry, workshop.artifacts, 1, workshop.dataset, until=LAST_SECOND, device="cpu"
    )
    refresh(backcast, actor="ann")
    assert served(backcast, Entity.USER, [put]).tolist() == [[1.0] * 10]
