"""What the documents say of settings, errors and files is what the code says."""

import itertools
import re

import pytest

from backcast.acts import ActName
from backcast.errors import BackcastError
from backcast.settings import Settings
from service.problems import HTTP_CODES, status_of
from tests.e2e.documents import ROOT
from trainer.config import PRESETS, RECIPES, TrainConfig

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    rows = _rows("docs/settings.md")
    expected = [
        [f"`BACKCAST_{name.upper()}`", _shown(field.default), field.description]
        for name, field in Settings.model_fields.items()
    ]
    assert rows == expected


def test_every_training_setting_is_documented_with_both_presets() -> None:
    rows = {row[0].strip("`"): row[1:3] for row in _rows("docs/training.md")}
    small, paper = TrainConfig.load("small"), TrainConfig.load("paper")
    assert list(rows) == list(TrainConfig.model_fields)
    for name, shown in rows.items():
        without = "the method's" if name == "alignment_weight" else "none"
        given = [getattr(config, name) for config in (small, paper)]
        assert shown == [without if value is None else _plain(value) for value in given], name


def test_every_recipe_is_documented_with_what_it_sets() -> None:
    text = (ROOT / "docs/training.md").read_text()
    names = (
        *("epochs", "batch_size", "learning_rate", "evaluate_every"),
        *("adam_beta2", "averaging", "unit_scores"),
    )
    for recipe, preset in itertools.product(RECIPES, PRESETS):
        (row,) = re.findall(
            rf"^\| {recipe}, {preset}(?: \(default\))? \|(.*)\|$", text, re.MULTILINE
        )
        config = TrainConfig.load(preset, recipe=recipe)
        assert [cell.strip() for cell in row.split("|")] == [
            _plain(getattr(config, name)) for name in names
        ]


def test_every_error_is_documented_with_its_status() -> None:
    rows = {row[0].strip("`"): int(row[1]) for row in _rows("docs/http.md") if row[1].isdigit()}
    framework = {code: int(status) for status, code in HTTP_CODES.items()}
    assert rows == framework | {c.code: int(status_of(c)) for c in _family(BackcastError)[1:]}


def test_every_act_is_documented() -> None:
    table = (ROOT / "docs/security.md").read_text()
    [row] = [line for line in table.splitlines() if line.startswith("| `act` |")]
    assert sorted(re.findall(r"`([\w-]+)`", row.removeprefix("| `act` |"))) == sorted(ActName)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: object) -> None:
    path = ROOT / str(document)
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text()):
        if "://" not in target:
            linked = path.parent / target if target else path
            assert linked.exists(), target
            assert not anchor or anchor in _anchors(linked.read_text()), f"{target}#{anchor}"


def _anchors(text: str) -> list[str]:
    """Return what the headings of a Markdown text can be linked to by."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def _rows(document: str) -> list[list[str]]:
    """Return the cells of all table rows that begin with a code span."""
    lines = (ROOT / document).read_text().splitlines()
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("| `")
    ]


def _shown(default: object) -> str:
    return "" if default in ("", None) else f"`{default}`"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _family(cls: type[BackcastError]) -> list[type[BackcastError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _family(child))]
