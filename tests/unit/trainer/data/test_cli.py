"""``backcast data``: what the commands write, print and refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from backcast.errors import DataError, InvalidInput
from trainer.data.cli import app
from trainer.data.dataset import Dataset, Manifest

SYNTH = ["synth", "--users", "50", "--items", "40", "--interactions", "400"]


def ran(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_synth_writes_a_data_set_and_prints_its_counts(tmp_path: Path) -> None:
    result = ran(*SYNTH, "--out", str(tmp_path / "shop"), "--seed", "3")
    dataset = Dataset.read(tmp_path / "shop")
    assert (len(dataset.user_ids), len(dataset.item_ids), len(dataset.users)) == (50, 40, 400)
    assert dataset.name == "shop"
    lines = [line.strip("│ ").split("│") for line in result.stdout.splitlines()]
    cells = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    assert cells["users"] == "50"
    assert cells["interactions"] == "400"
    assert cells["brand values"] == "2"
    assert cells["duplicate interactions"] == "0"
    assert Manifest.read(tmp_path / "shop").source == {
        "importer": "synth",
        "users": 50,
        "items": 40,
        "interactions": 400,
        "seed": 3,
        "days": 2000,
        "brands": None,
        "categories": None,
        "drift": 0.5,
    }


def test_json_is_all_there_is_on_standard_output(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    result = ran(*SYNTH, "--out", str(folder), "--name", "generated", "--json")
    manifest = Manifest.read(folder)
    assert json.loads(result.stdout) == {
        "name": "generated",
        "folder": str(folder),
        "fingerprint": manifest.fingerprint,
        "counts": manifest.counts,
    }


def test_equal_seeds_give_equal_fingerprints(tmp_path: Path) -> None:
    prints = [
        json.loads(ran(*SYNTH, "--out", str(tmp_path / name), "--seed", seed, "--json").stdout)[
            "fingerprint"
        ]
        for name, seed in [("a", "1"), ("b", "1"), ("c", "2")]
    ]
    assert prints[0] == prints[1] != prints[2]


def test_overwriting_must_be_asked_for(tmp_path: Path) -> None:
    arguments = [*SYNTH, "--out", str(tmp_path / "shop")]
    ran(*arguments)
    with pytest.raises(DataError, match="already holds a data set"):
        ran(*arguments)
    ran(*arguments, "--overwrite", "--seed", "1")
    assert Manifest.read(tmp_path / "shop").source["seed"] == 1


def test_csv_takes_every_option(tmp_path: Path) -> None:
    edges = tmp_path / "edges.tsv"
    edges.write_text("who\twhat\twhen\nann\tpen\t2013-05-01\nbob\tpen\tsoon\n")
    items = tmp_path / "items.tsv"
    items.write_text("sku\tkinds\tbrand\tprice\npen\ta;b\tbic\t3\n")
    result = ran(
        *("csv", "--interactions", str(edges), "--items", str(items)),
        *("--user-column", "who", "--item-column", "what", "--no-rating"),
        *("--timestamp-column", "when", "--timestamp-unit", "iso"),
        *("--item-id-column", "sku", "--list-column", "kinds", "--separator", ";"),
        *("--attribute", "brand", "--delimiter", r"\t", "--skip-malformed"),
        *("--out", str(tmp_path / "shop"), "--name", "tiny", "--json"),
    )
    assert json.loads(result.stdout)["counts"] == {
        "users": 1,
        "items": 1,
        "interactions": 1,
        "unrated_interactions": 1,
        "kinds_values": 2,
        "brand_values": 1,
        "duplicate_interactions": 0,
        "unlisted_items": 0,
        "malformed_interactions": 1,
        "malformed_items": 0,
        "duplicate_items": 0,
    }
    dataset = Dataset.read(tmp_path / "shop")
    assert dataset.timestamps.tolist() == [1367366400]
    assert dataset.attributes["kinds"].of(0) == ["a", "b"]


def test_csv_defaults_are_the_documented_columns(tmp_path: Path) -> None:
    edges = tmp_path / "edges.csv"
    edges.write_text("user_id,item_id,rating,timestamp\nann,pen,4,7\n")
    result = ran("csv", "--interactions", str(edges), "--out", str(tmp_path / "shop"))
    assert Dataset.read(tmp_path / "shop").ratings.tolist() == [4.0]
    assert f"Written to {tmp_path / 'shop'}" in result.stdout


def test_errors_of_the_library_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.csv does not exist"):
        ran("csv", "--interactions", str(tmp_path / "absent.csv"), "--out", str(tmp_path / "shop"))
    with pytest.raises(InvalidInput, match="interactions is 5; expected 2000"):
        ran("synth", "--interactions", "5", "--out", str(tmp_path / "shop"))


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("csv", "backcast data csv --out shop"),
        ("synth", "backcast data synth --out shop --users 5000 --seed 7"),
    ],
)
def test_help_has_an_example_on_a_line_of_its_own(command: str, example: str) -> None:
    lines = [line.strip(" \\") for line in ran(command, "--help").output.splitlines()]
    assert example in lines


def test_naming_the_commands_does_not_load_the_importers() -> None:
    script = "import sys, trainer.data.cli; print([m for m in sys.modules if 'trainer.data' in m])"
    root = Path(__file__).parents[4]
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == "['trainer.data', 'trainer.data.cli']"
