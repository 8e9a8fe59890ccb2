"""The whole story over real processes and HTTP: does the product do its job?"""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from backcast.errors import ConfigError
from tests.e2e.documents import ROOT
from trainer.data.csv import CsvSource, import_csv
from trainer.data.dataset import write_dataset
from trainer.data.synth import SynthConfig, synthesize
from trainer.demo import Chapter, DemoConfig, DemoResult, run_demo

EPOCHS = 20
AMAZON = ROOT.parent / "shared" / "data" / "amazon"
FEW_POINTS = 0.05 if AMAZON.exists() else 0.12
"""Generated data of this size is far from fitted after so few epochs, and its map too."""


@pytest.fixture(scope="module")
def review_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real review graph; where it is not at hand, generated data of a like size, said so."""
    folder = tmp_path_factory.mktemp("reviews") / "data"
    if AMAZON.exists():
        source = CsvSource(
            interactions=AMAZON / "interactions.csv.gz",
            items=AMAZON / "items.csv.gz",
            list_columns=("categories",),
        )
        import_csv(source, folder, name="amazon")
    else:
        print(f"{AMAZON} is not there: generated data stands in for it.")  # noqa: T201
        interactions, items = synthesize(SynthConfig(users=6000, items=2700, interactions=190_000))
        write_dataset(folder, interactions, items, name="generated", source={}, counts={})
    return folder


@pytest.fixture(scope="module")
def story(review_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """Three versions on the review graph."""
    home = tmp_path_factory.mktemp("home")
    config = DemoConfig(review_data, home, epochs=EPOCHS, batch_size=4096, versions=3, seed=0)
    return run_demo(config, lambda _line: None)


def test_ver_0_served_at_version_0_is_the_model_itself(story: DemoResult) -> None:
    first = story.chapters[0]
    assert first.auc_compatible == pytest.approx(first.auc_true, abs=1e-6)
    assert first.auc_latest == first.auc_compatible


def test_compatible_vectors_keep_the_consumer_within_a_few_points(story: DemoResult) -> None:
    for chapter in story.chapters[1:]:
        assert chapter.auc_true > 0.75
        assert chapter.auc_compatible > chapter.auc_true - FEW_POINTS


def test_raw_latest_vectors_do_not(story: DemoResult) -> None:
    # Not at once: a grown model begins with its parent's coordinates where they were.
    one, two = story.chapters[1:]
    assert one.auc_latest < one.auc_compatible - 0.02
    assert two.auc_latest < two.auc_compatible - 0.05


def test_storage_stays_that_of_one_version(story: DemoResult) -> None:
    last = story.chapters[-1]
    assert [c.dim for c in story.chapters] == [32, 40, 48]
    ids_and_index = last.bytes_stored - last.bytes_keep_all * last.dim / (32 + 40 + 48)
    assert 0 < ids_and_index < 0.3 * last.bytes_stored


def test_demo_command_prints_the_story_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "backcast", "demo", "--json", "--epochs", "2"]
    done = subprocess.run(
        [*command, "--versions", "2", "--home", str(tmp_path / "home")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    document = orjson.loads(done.stdout)
    assert [Chapter(**c).version for c in document["chapters"]] == [0, 1]


def test_demo_refuses_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "backcast", "demo", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr == f"error: {tmp_path} holds something else. Name another folder with --home.\n"
    )
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_demo_does_not_delete_the_data_it_is_given(tmp_path: Path) -> None:
    data = tmp_path / "home" / "data"
    data.mkdir(parents=True)
    config = DemoConfig(data, tmp_path / "home", 1, 1, 2, 0)
    with pytest.raises(ConfigError, match="Move it out"):
        run_demo(config, lambda _line: None)
    assert data.exists()
