"""The whole story on one machine: train, publish, serve, promote, and a consumer that stays.

The service is a real process that is talked to over HTTP; what the consumer sees is what any
consumer team would see.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
import torch
from torch import Tensor

from backcast.artifacts import Artifacts
from backcast.cli.output import progress
from backcast.client import Client
from backcast.errors import ConfigError, DataError, ServiceError
from backcast.registry import Registry, open_registry
from backcast.settings import Settings
from backcast.stores import open_store
from backcast.versions import OperationState, Scope, Version
from trainer.archive import load_model
from trainer.config import Protocol, TrainConfig
from trainer.data.dataset import Dataset, resolve_until, write_dataset
from trainer.data.synth import SynthConfig, synthesize
from trainer.evaluation.consumers import Consumers, train_consumers
from trainer.evaluation.tasks import ITEM_RATING_AVG, Timeline
from trainer.methods import DEFAULT_METHOD, method
from trainer.publishing import publish_version, run_model
from trainer.training import TrainRequest, train_version

FIRST_CUT, STEP = 0.5, 0.1
TASK = ITEM_RATING_AVG
_MARK = ".made-by-backcast-demo"
_START_SECONDS = 60.0
_COLLECTION_SECONDS = 60.0
_NO_USERS = torch.empty(0, 0)

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoConfig:
    """What to show: own data or generated data, and how much training."""

    data: Path | None
    home: Path
    epochs: int
    batch_size: int
    versions: int
    seed: int


@dataclass(frozen=True)
class Chapter:
    """What the consumer saw while version k was live.

    ROC-AUC of the consumer trained once on ver-0 vectors; bytes of all vectors, users and items.
    """

    version: int
    dim: int
    auc_compatible: float
    auc_latest: float
    auc_true: float
    recall_at_50: float
    bytes_stored: int
    bytes_keep_all: int


@dataclass(frozen=True)
class Table:
    """A table to print."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class DemoResult:
    """The chapters of the story, and how long it took."""

    chapters: Sequence[Chapter]
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return the result as a JSON document."""
        return {"chapters": [asdict(c) for c in self.chapters], "seconds": self.seconds}

    def tables(self) -> list[Table]:
        """Return what a person is shown."""
        consumer = Table(
            "A consumer trained once on ver-0 vectors (ROC-AUC, task: item rating avg)",
            (
                "live version",
                "dim",
                "ver-0-compatible",
                "latest, cut to ver-0's dim",
                "true ver-0",
                "Recall@50 of the live model",
            ),
            [
                (
                    c.version,
                    c.dim,
                    f"{c.auc_compatible:.4f}",
                    f"{c.auc_latest:.4f}",
                    f"{c.auc_true:.4f}",
                    f"{c.recall_at_50:.4f}",
                )
                for c in self.chapters
            ],
        )
        storage = Table(
            "Storage to serve all versions so far",
            ("live version", "stored (vectors, ids, index)", "keep-all (vectors alone)", "ratio"),
            [
                (
                    c.version,
                    f"{c.bytes_stored / 1e6:.2f} MB",
                    f"{c.bytes_keep_all / 1e6:.2f} MB",
                    f"{c.bytes_keep_all / c.bytes_stored:.2f}",
                )
                for c in self.chapters
            ],
        )
        return [consumer, storage]

    def verdict(self) -> str:
        """Say in one sentence what the last chapter shows."""
        last = self.chapters[-1]
        return (
            f"After {len(self.chapters) - 1} promotions the consumer, never retrained, scores "
            f"{last.auc_compatible:.3f} on ver-0-compatible vectors; it would score "
            f"{last.auc_true:.3f} on true ver-0 vectors and {last.auc_latest:.3f} on the latest "
            f"ones cut to its dimension. {self.seconds:.0f} s in all."
        )


def run_demo(config: DemoConfig, say: Say) -> DemoResult:
    """Tell the story and return its figures.

    Raises:
        ConfigError: ``home`` holds something that no earlier demo made.
    """
    started = time.perf_counter()
    if config.data and config.data.resolve().is_relative_to(config.home.resolve()):
        raise ConfigError(f"{config.data} lies in {config.home}, which is made anew. Move it out.")
    home = _fresh_home(config.home)
    dataset = _dataset(config, home)
    say(
        f"Data: {dataset.name}, {len(dataset.user_ids)} users, {len(dataset.item_ids)} items, "
        f"{len(dataset.users)} interactions"
    )
    settings = Settings.load(
        home=home.absolute(),
        database_url="",
        artifacts_url="",
        store_url="embedded:",
        grace_seconds=0.0,
    )
    with open_registry(settings) as registry:
        _, key = registry.keys.create("demo", Scope.ADMIN)
        with _service(settings) as url, Client(url, key) as client:
            say(f"Service: {url}")
            story = _Story(config, dataset, settings, registry, client, say)
            chapters = [story.chapter(k) for k in range(config.versions)]
    return DemoResult(chapters, time.perf_counter() - started)


class _Story:
    def __init__(
        self,
        config: DemoConfig,
        dataset: Dataset,
        settings: Settings,
        registry: Registry,
        client: Client,
        say: Say,
    ) -> None:
        self._config, self._dataset, self._settings = config, dataset, settings
        self._registry, self._client, self._say = registry, client, say
        self._artifacts = Artifacts(settings.artifacts_root)
        self._training = TrainConfig.load(
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            device=settings.device,
        )
        cuts = [self._cut(k) for k in range(config.versions + 1)]
        self._timeline = Timeline(dataset, cuts, Protocol.STRICT)
        self._examples = TASK.training(self._timeline, 0)
        if not self._examples.has_both_classes:
            raise DataError(
                f"{dataset.folder}: no items with more than 10 ratings and different means yet."
            )
        self._consumers: Consumers | None = None

    def chapter(self, k: int) -> Chapter:
        """Train, publish and promote version k; then look at it as the consumer does."""
        version = self._train(k)
        publish_version(
            self._registry,
            self._artifacts,
            k,
            self._dataset,
            until=self._cut(k),
            device=self._settings.device,
        )
        self._promote(k)
        if self._consumers is None:
            self._consumers = self._train_consumers()
        served = self._fetch(k, version=0)
        latest = self._fetch(k, version=k)[:, : served.shape[1]]
        return Chapter(
            version=k,
            dim=version.dim,
            auc_compatible=self._auc(self._consumers, k, served),
            auc_latest=self._auc(self._consumers, k, latest),
            auc_true=self._auc(self._consumers, k, self._true_vectors(k)),
            recall_at_50=version.details["metrics"]["recall_at_50"],
            bytes_stored=self._bytes_stored(),
            bytes_keep_all=self._bytes_keep_all(k),
        )

    def _cut(self, k: int) -> int:
        return resolve_until(self._dataset, f"{FIRST_CUT + STEP * k:.1f}")

    def _train(self, k: int) -> Version:
        request = TrainRequest(
            self._dataset, self._training, self._cut(k), method(DEFAULT_METHOD), self._cut(k + 1)
        )
        with progress(f"training version {k}, epoch", self._config.epochs) as advance:
            return train_version(
                self._registry,
                self._artifacts,
                request,
                lambda report: advance(report.epoch, f"loss {report.loss:.4f}"),
            )

    def _promote(self, k: int) -> None:
        operation = self._client.promote(k, expected_live=k - 1 if k else None)
        while operation["state"] in {OperationState.PENDING, OperationState.RUNNING}:
            time.sleep(0.05)
            operation = self._client.operation(operation["id"])
        if operation["state"] != OperationState.SUCCEEDED:
            raise ServiceError(f"Version {k} was not promoted: {operation['error']['message']}")
        self._say(f"Version {k} is live.")

    def _train_consumers(self) -> Consumers:
        self._say(f"A consumer trains on {len(self._examples)} ver-0 vectors, once.")
        vectors = self._fetch(0, version=0)
        return train_consumers(self._timeline, 0, lambda _k: (_NO_USERS, vectors), tasks=(TASK,))

    def _fetch(self, k: int, version: int) -> Tensor:
        """Return the vectors of all items known at cut k, as version k serves them."""
        known = self._dataset.items_known(self._cut(k))
        answer = self._client.get_many(self._dataset.item_ids[:known].tolist(), version=version)
        if answer.missing:
            raise ServiceError(f"{len(answer.missing)} items have no vector.")
        return torch.from_numpy(answer.vectors)

    def _auc(self, consumers: Consumers, k: int, items: Tensor) -> float:
        examples = TASK.test(self._timeline, 0, k)
        aucs = consumers.auc_on(TASK.name, examples, _NO_USERS, items)
        if aucs is None:
            raise DataError(f"{self._dataset.folder}: all much-rated items have one label at {k}.")
        return fmean(aucs)

    def _true_vectors(self, k: int) -> Tensor:
        archived = load_model(self._artifacts, self._registry.versions.get(0))
        _, _, items = run_model(archived, self._dataset, self._cut(k), self._settings.device)
        return torch.from_numpy(items)

    def _bytes_stored(self) -> int:
        self._await_collection()
        store = open_store(self._settings)
        return sum(store.open(snapshot).size for snapshot in store.snapshots())

    def _await_collection(self) -> None:
        """Wait until the service has deleted what was live before: within moments, as nothing asks
        for it any more.
        """
        give_up = time.monotonic() + _COLLECTION_SECONDS
        while len(self._registry.snapshots.undeleted()) > 1:
            if time.monotonic() > give_up:
                raise ServiceError("The service does not delete what is over its grace period.")
            time.sleep(0.05)

    def _bytes_keep_all(self, k: int) -> int:
        until = self._cut(k)
        nodes = self._dataset.users_known(until) + self._dataset.items_known(until)
        return sum(4 * nodes * self._registry.versions.get(j).dim for j in range(k + 1))


def _fresh_home(home: Path) -> Path:
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        if not (home / _MARK).exists():
            raise ConfigError(f"{home} holds something else. Name another folder with --home.")
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / _MARK).touch()
    return home


def _dataset(config: DemoConfig, home: Path) -> Dataset:
    if config.data is not None:
        return Dataset.read(config.data)
    folder = home / "data"
    generated = SynthConfig(seed=config.seed)
    interactions, items = synthesize(generated)
    write_dataset(
        folder,
        interactions,
        items,
        name="generated",
        source={"importer": "synth", **asdict(generated)},
        counts={},
    )
    return Dataset.read(folder)


@contextmanager
def _service(settings: Settings) -> Iterator[str]:
    """Run ``backcast serve`` on a free port of this machine, and stop it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", settings.home / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "backcast", "serve", "--port", str(port)],
            env=_environment(settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _await(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait()


def _environment(settings: Settings) -> dict[str, str]:
    others = {k: v for k, v in os.environ.items() if not k.startswith("BACKCAST_")}
    return others | {
        "BACKCAST_HOME": str(settings.home),
        "BACKCAST_DEVICE": settings.device,
        "BACKCAST_GRACE_SECONDS": str(settings.grace_seconds),
    }


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while not _is_alive(url):
        if process.poll() is not None or time.monotonic() > give_up:
            last = log.read_text().strip().splitlines()[-1:]
            raise ServiceError(f"The service did not start: {' '.join(last)}. See {log}.")
        time.sleep(0.1)


def _is_alive(url: str) -> bool:
    try:
        return bool(httpx2.get(f"{url}/livez", timeout=1.0).is_success)
    except httpx2.TransportError:
        return False
