"""The ``backcast`` command, as a person and as a script meet it."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from fsspec.implementations.local import LocalFileSystem
from typer.main import get_command

from backcast.cli import app, main
from backcast.cli.output import interruptible
from backcast.lifecycle import open_backcast, publish
from backcast.registry import open_registry
from backcast.registry.database import utc_now
from backcast.settings import Settings
from backcast.snapshots import read_snapshot
from backcast.versions import Live, Use
from tests.support import build_home
from tests.trainer_support import command, environment, synthetic, threads
from trainer.cli import after_publishing, train
from trainer.data.dataset import Dataset, resolve_until
from trainer.methods import DEFAULT_METHOD

TINY = """\
widths = [8, 10, 12]
layers = [1, 2, 2]
epochs = 4
batch_size = 512
learning_rate = 0.01
evaluate_every = 2
"""


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status, and its two outputs."""

    code: int | str | None
    output: str
    log: str


class Shell:
    """Runs ``backcast`` in this process, in a home of its own."""

    def __init__(
        self, home: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.home = home
        self._patch, self._capture = patch, capture

    def __call__(self, *arguments: str, **variables: str) -> Result:
        with self._patch.context() as patch:
            for name, value in {"BACKCAST_HOME": str(self.home), **variables}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["backcast", *arguments])
            self._capture.readouterr()
            code: int | str | None = 0
            try:
                main()
            except SystemExit as ended:
                code = ended.code
            return Result(code, *self._capture.readouterr())


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path / "home", monkeypatch, capsys)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set folder of four interactions."""
    folder = tmp_path_factory.mktemp("shop")
    rows = "user_id,item_id,rating,timestamp\nu,i,5,100\nv,i,1,200\nu,j,3,300\nv,j,4,400\n"
    (folder / "interactions.csv").write_text(rows)
    run = subprocess.run(
        command(
            *("data", "csv", "--interactions", str(folder / "interactions.csv")),
            *("--out", str(folder / "data")),
        ),
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return str(folder / "data")


# --- help -----------------------------------------------------------------------------------------


def walk(group: Any, context: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every command that does something."""
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if hasattr(found, "list_commands"):
            yield from walk(found, context, (*path, name))
        else:
            yield (*path, name)


ROOT: Any = get_command(app)
COMMANDS = list(walk(ROOT, typer.Context(ROOT)))


def found_command(path: Sequence[str]) -> Any:
    found = ROOT
    for name in path:
        found = found.get_command(typer.Context(found), name)
    return found


def test_the_documented_commands_are_there() -> None:
    documented = {
        *(("demo",), ("train",), ("publish",), ("promote",), ("versions",), ("serve",), ("get",)),
        *(("data", "synth"), ("data", "csv")),
        *(("keys", "create"), ("keys", "rotate"), ("keys", "revoke"), ("keys", "list")),
        ("audit",),
        *(("deprecate",), ("retire",), ("pin",), ("consumers",), ("usage",)),
        *(("rollback",), ("refresh",), ("operations",), ("gc",), ("snapshots",)),
        *(("db", "upgrade"), ("db", "check"), ("db", "downgrade")),
    }
    assert documented <= set(COMMANDS)
    assert len(COMMANDS) == len(set(COMMANDS))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_what_a_command_does_and_an_example(shell: Shell, path: tuple[str, ...]) -> None:
    result = shell(*path, "--help", COLUMNS="200", TERMINAL_WIDTH="200")
    assert (result.code, result.log) == (0, "")
    assert f"backcast {' '.join(path)}" in result.output
    assert "Example:" in result.output
    assert len(found_command(path).help.splitlines()[0]) > 20
    undescribed = [p.name for p in found_command(path).params if not getattr(p, "help", None)]
    assert undescribed == []


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_example_can_be_typed(path: tuple[str, ...]) -> None:
    example = found_command(path).epilog.partition("Example:")[2]
    words = shlex.split(example.replace("\\\n", " "))
    assert words[: len(path) + 1] == ["backcast", *path]
    found_command(path).make_context(" ".join(path), words[len(path) + 1 :])  # refuses bad options


@pytest.mark.parametrize("arguments", [(), ("data",), ("keys",), ("db",)], ids=" ".join)
def test_a_group_alone_lists_its_commands(shell: Shell, arguments: tuple[str, ...]) -> None:
    result = shell(*arguments)
    expected = {path[len(arguments)] for path in COMMANDS if path[: len(arguments)] == arguments}
    shown = set(re.findall(r"^│ ([\w-]+) ", result.output + result.log, flags=re.MULTILINE))
    assert expected <= shown


# --- errors ---------------------------------------------------------------------------------------

ERRORS = [
    (("train", "--data", "absent", "--until", "0.5"), {}, "absent is not a data set folder"),
    (("train", "--data", "DATA", "--until", "tomorrow"), {}, "'tomorrow' is no moment"),
    (("train", "--data", "DATA", "--until", "0"), {}, "'0' is no moment"),
    (("train", "--data", "DATA", "--until", "99"), {}, "'99' is before the first interaction"),
    (("train", "--data", "DATA", "--until", "1", "--horizon", "x"), {}, "'x' is no moment"),
    (("train", "--data", "DATA", "--until", "1"), {}, "no item attribute has a value on 5 items"),
    (
        ("train", "--data", "DATA", "--until", "1", "--protocol", "paper"),
        {},
        "protocol=paper selects on the edges after --until: give --horizon",
    ),
    (("train", "--data", "DATA", "--until", "1", "--parent", "4"), {}, "Version 4 does not exist"),
    (
        ("train", "--data", "DATA", "--until", "1", "--method", "magic"),
        {},
        "Method 'magic' is unknown; there are keep-all, ",
    ),
    (
        ("train", "--data", "DATA", "--until", "1", "--method", "keep-all"),
        {},
        "Keep-All has no map to serve old versions through. Train with one of finetune-m0, ",
    ),
    (
        ("train", "--data", "DATA", "--until", "1", "--recipe", "slow"),
        {},
        "Recipe 'slow' is unknown; there are fast, published",
    ),
    (("train", "--data", "DATA", "--until", "1", "--preset", "huge"), {}, "Preset 'huge'"),
    (
        ("train", "--data", "DATA", "--until", "1", "--config", "no.toml"),
        {},
        "no.toml cannot be read: No",
    ),
    (("train", "--data", "DATA", "--until", "1", "--lambda", "-1"), {}, "alignment_weight"),
    (("train", "--data", "DATA", "--until", "1", "--epochs", "0"), {}, "epochs"),
    (("train", "--data", "DATA", "--until", "1", "--seed", "-1"), {}, "seed"),
    (("train", "--data", "DATA", "--until", "1", "--device", "tpu"), {}, "device"),
    (("publish", "7"), {}, "Version 7 does not exist"),
    (("publish", "7", "--data", "DATA"), {}, "Version 7 does not exist"),
    (("promote", "7"), {}, "Version 7 does not exist"),
    (("promote", "7", "--dry-run"), {}, "Version 7 does not exist"),
    (("rollback", "--reason", "x"), {}, "Nothing is live, so there is nothing to roll back"),
    (("rollback", "--dry-run"), {}, "Nothing is live, so there is nothing to roll back"),
    (("operations", "--cancel"), {}, "--cancel needs the operation"),
    (("operations", "0f", "--reason", "x"), {}, "give --cancel too"),
    (("operations", "0f", "--cancel"), {}, "No operation '0f'; `backcast operations` lists"),
    (("refresh",), {}, "Nothing is live, so nothing can be refreshed"),
    (("keys", "revoke", "1a2b3c4d"), {}, "No key has the prefix '1a2b3c4d'"),
    (("keys", "rotate", "1a2b3c4d"), {}, "No key has the prefix '1a2b3c4d'"),
    (("keys", "rotate", "1a2b3c4d", "--overlap", "long"), {}, "--overlap 'long' is no duration"),
    (("audit", "--since", "then"), {}, "--since 'then' is no moment; write 2027-01-31 or"),
    (("keys", "create", "--consumer", "ranking", "--pin", "7"), {}, "Version 7 does not exist"),
    (("keys", "create", "--consumer", " "), {}, "A consumer's name has 1 to 128 characters"),
    (("keys", "create", "--consumer", "q\x1b[31m"), {}, r"name 'q\x1b[31m' has a blank at an end"),
    (("pin", "q\x1b[31m", "--clear"), {}, r"No consumer 'q\x1b[31m'"),
    (
        ("keys", "create", "--consumer", "x", "--expires", "2020-01-31"),
        {},
        "The expiry 2020-01-31T00:00:00+00:00 is over",
    ),
    (
        ("keys", "create", "--consumer", "(anonymous)"),
        {},
        "(anonymous) stands for callers without a key",
    ),
    (("deprecate", "7", "--sunset", "2099-01-31"), {}, "Version 7 does not exist"),
    (("deprecate", "7", "--withdraw"), {}, "Version 7 does not exist"),
    (("deprecate", "7"), {}, "Name either a --sunset, such as 2027-01-31, or --withdraw"),
    (("deprecate", "7", "--withdraw", "--sunset", "2099-01-31"), {}, "Name either a --sunset"),
    (("deprecate", "7", "--sunset", "soon"), {}, "--sunset 'soon' is no moment; write 2027-01-31"),
    (("deprecate", "7", "--sunset", "2099-01-31T12:00"), {}, "has no zone; add Z for UTC"),
    (("deprecate", "7", "--sunset", "2020-01-31"), {}, "2020-01-31T00:00:00+00:00 is over"),
    (("retire", "7"), {}, "Version 7 does not exist"),
    (("retire", "7", "--force"), {}, "A forced retirement needs a reason"),
    (("pin", "ranking", "7"), {}, "Version 7 does not exist"),
    (("pin", "ranking", "--clear"), {}, "No consumer 'ranking'; `backcast consumers` lists them"),
    (("pin", "ranking"), {}, "Name either a version or --clear"),
    (("db", "check"), {}, "The registry's schema is absent"),
    (("data", "csv", "--interactions", "no.csv", "--out", "new"), {}, "no.csv does not exist"),
    (("data", "synth", "--out", "new", "--users", "0"), {}, "users is 0; expected at least 1"),
    (("data", "synth", "--out", "DATA"), {}, "already holds a data set"),
    (("versions",), {"BACKCAST_MAX_BATCH": "many"}, "BACKCAST_MAX_BATCH='many'"),
    (("versions",), {"BACKCAST_DEVICE": "tpu"}, "BACKCAST_DEVICE='tpu'"),
    (("versions",), {"BACKCAST_DATABASE_URL": "nonsense"}, "BACKCAST_DATABASE_URL"),
    (
        ("train", "--data", "DATA", "--until", "1"),
        {"BACKCAST_GRACE_SECONDS": "-1"},
        "BACKCAST_GRACE_SECONDS='-1'",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    ERRORS,
    ids=[" ".join((*arguments, *variables)) for arguments, variables, _ in ERRORS],
)
def test_an_error_is_one_line_that_says_what_is_wrong(
    shell: Shell, data: str, arguments: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    result = shell(*(data if word == "DATA" else word for word in arguments), **variables)
    assert (result.code, result.output) == (1, "")
    *progress, last = result.log.splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert all(line.startswith(("promoting version", "rolling back")) for line in progress)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("train", "--until", "0.5"), "--data"),
        (("nothing",), "nothing"),
        (("publish", "x"), "'version'"),
    ],
    ids=["option", "command", "argument"],
)
def test_a_mistyped_command_ends_with_2(
    shell: Shell, arguments: tuple[str, ...], missing: str
) -> None:
    result = shell(*arguments)
    assert (result.code, result.output) == (2, "")
    assert missing in result.log


# --- what the core's commands print ---------------------------------------------------------------


@pytest.fixture
def published(shell: Shell) -> Shell:
    """Versions 0, 1 and 2, of which 2 is trained on 0; all are published, 1 is live."""
    with build_home(shell.home, dims=(4, 6, 8), parents=(None, 0, 0), live=1):
        return shell


def test_versions_for_a_script(published: Shell) -> None:
    listed = json.loads(published("versions", "--json").output)
    assert listed["live_version"] == 1
    facts = ("number", "parent", "state", "dim", "on_live_chain")
    assert [tuple(v[fact] for fact in facts) for v in listed["versions"]] == [
        (0, None, "superseded", 4, True),
        (1, 0, "live", 6, True),
        (2, 0, "registered", 8, False),
    ]


def test_versions_for_a_person(published: Shell) -> None:
    lines = published("versions").output.splitlines()
    cells = [re.split(r"\s*[│┃]\s*", line)[1:6] for line in lines if line.startswith(("│", "┃"))]
    assert cells == [
        ["version", "state", "dim", "parent", "method"],
        ["0", "superseded", "4", "-", "bc-aligner"],
        ["1", "live", "6", "0", "bc-aligner"],
        ["2", "registered", "8", "0", "bc-aligner"],
    ]


def test_versions_says_how_each_one_ends_and_why(published: Shell) -> None:
    live = published("deprecate", "1", "--sunset", "2099-01-31").output.splitlines()
    assert live[1:] == ["It is live: its answers name no successor until a newer version is."]
    published("deprecate", "1", "--withdraw")
    published("deprecate", "0", "--sunset", "2099-01-31", "--reason", "use version 2")
    assert published("versions").output.splitlines()[-1:] == [
        "Version 0 is deprecated, and served until 2099-01-31 00:00 UTC: use version 2"
    ]
    assert published("rollback", "--reason", "clicks fell").code == 0
    assert published("versions").output.splitlines()[-2:] == [
        "Version 0 is deprecated, and served until 2099-01-31 00:00 UTC: use version 2",
        "Version 1 is rolled_back: clicks fell",
    ]


def test_an_empty_list_is_a_sentence(published: Shell) -> None:
    assert "There is no key yet. Create one: " in published("keys", "list").output
    assert "One begins with its first key: " in published("consumers").output
    assert published("usage").output.startswith("Nobody asked for a vector since ")
    assert published("usage", "--version", "0").output.startswith("Nobody asked for version 0 ")
    unknown = published("usage", "--version", "9")
    assert (unknown.code, unknown.output) == (1, "")
    assert unknown.log.startswith("error: Version 9 does not exist; ")


def test_publishing_says_what_comes_next() -> None:
    live = Live(version=1, snapshot="v1-x", delta=0, generation=3)
    assert after_publishing(0, None) == "backcast promote 0"
    assert after_publishing(1, live) == "backcast refresh --dry-run, then backcast refresh"
    assert after_publishing(2, live) == "backcast diff 2, then backcast promote 2"


def test_no_version_yet_says_how_to_begin(shell: Shell) -> None:
    result = shell("versions")
    assert result.code == 0
    assert "backcast train" in result.output
    assert json.loads(shell("versions", "--json").output) == {"live_version": None, "versions": []}


def test_training_and_publishing_for_a_person(shell: Shell) -> None:
    dataset = synthetic(shell.home.parent / "shop")
    (shell.home.parent / "tiny.toml").write_text(TINY)
    start = ("train", "--data", "shop", "--config", "tiny.toml")
    with threads(1):
        first = shell(*start, "--until", "0.5")
        second = shell(*start, "--until", "0.6", "--horizon", "0.7", "--lambda", "4")
        snapshot = shell("publish", "1", "--until", "0.6")
        third = shell(*start, "--until", "0.55")
    assert [result.code for result in (first, second, snapshot, third)] == [0, 0, 0, 0]

    assert "Version 0 is registered: 8 dimensions\n" in first.output
    assert first.output.endswith(
        f"Method: intended-only; interactions until {moment(dataset, 0.5)}\n"
        "Next: backcast publish 0, then backcast promote 0\n"
    )
    until = moment(dataset, 0.6)
    assert f"\nMethod: grown-direct; interactions until {until}\n" in second.output
    assert third.log.splitlines()[0] == (
        f"It sees less than its parent: interactions until {moment(dataset, 0.55)}, "
        f"version 1 until {until}."
    )
    assert metrics_in(first) == {"selected_epoch", "selection_recall_at_50", "seconds"}
    assert "Version 1 is registered: 10 dimensions, compatible with version 0\n" in second.output
    aligned = {"recall_at_50", "parent_recall_at_50", "alignment_error", "parent_norm"}
    assert metrics_in(second) == metrics_in(first) | aligned
    with open_registry(Settings.load(home=shell.home)) as registry:
        version, published = registry.versions.get(1), registry.snapshots.latest(1)
    assert f"│ recall_at_50           │ {version.details['metrics']['recall_at_50']:.4f} " in (
        second.output
    )
    assert version.details["config"]["alignment_weight"] == 4.0

    epoch = r"epoch \d+/4 loss \d+\.\d{4}"
    for log, words in ((first.log, ""), (second.log, r" · alignment \d+\.\d{4}")):
        best = r"( · best Recall@50 0\.\d{4})?"
        assert all(re.fullmatch(epoch + words + best, line) for line in log.splitlines()), log
        assert log.splitlines()[-1].startswith("epoch 4/4 ")

    users, items = dataset.users_known(version.until), dataset.items_known(version.until)
    unseen = len(dataset.item_ids) - items
    assert published is not None
    assert snapshot.output == (
        f"Snapshot {published.id} of version 1: {users} users, {items} items, 10 dimensions.\n"
        f"{unseen} items have no interaction until {until} and get no vector.\n"
        "Next: backcast promote 1\n"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("train", "--data", "shop", "--until", "1"), "Interrupted: nothing was registered.\n"),
        (("publish", "2", "--data", "shop"), "Interrupted; publish version 2 again.\n"),
    ],
)
def test_reading_the_data_can_be_interrupted(
    published: Shell, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], line: str
) -> None:
    def interrupt(_folder: Path) -> Dataset:
        raise KeyboardInterrupt

    monkeypatch.setattr(Dataset, "read", interrupt)
    result = published(*arguments)
    assert (result.code, result.output, result.log) == (130, "", line)


def moment(dataset: Dataset, fraction: float) -> str:
    return f"{datetime.fromtimestamp(resolve_until(dataset, fraction), UTC):%Y-%m-%d %H:%M:%S} UTC"


def metrics_in(result: Result) -> set[str]:
    """Return the names in the first column of the table that was printed."""
    return set(re.findall(r"^│ ([\w-]+) ", result.output, flags=re.MULTILINE))


def test_a_dry_run_that_fails_says_which_gate_and_ends_with_1(published: Shell) -> None:
    result = published("promote", "2", "--dry-run", "--json")
    plan = json.loads(result.output)
    assert result.code == 1
    passed = {gate["name"]: gate["passed"] for gate in plan["gates"]}
    assert [name for name in passed if not passed[name]] == ["lineage"]
    assert {"maps", "snapshot", "finite", "coverage-item", "change-0", "metric"} <= passed.keys()
    assert [found["version"] for found in plan["diff"]["versions"]] == [0]
    assert (plan["passed"], plan["live_version"], plan["servable_versions"]) == (False, 1, [0, 2])
    shown = published("promote", "2", "--dry-run")
    assert shown.code == 1
    assert re.search(
        r"lineage\s+│ FAILED │\s+- │\s+- │ chain 2 → 0; live version 1 is not on", shown.output
    )


def test_what_was_live_before_is_gone_back_to_by_a_rollback(published: Shell) -> None:
    assert "`backcast rollback` first" in published("promote", "0").log
    beside = published("promote", "2").log
    assert "gate lineage" in beside
    assert "rollback" not in beside


def test_gates_that_could_not_measure_do_not_say_that_they_passed(shell: Shell) -> None:
    with build_home(shell.home):
        shown = shell("promote", "0", "--dry-run").output
    for gate in ("coverage", "change"):
        assert re.search(rf"│ {gate} +│ not measured │ +- │ +- │ not measured: nothing is", shown)
    assert re.search(r"│ lineage +│ passed +│", shown)


def test_findings_that_are_sentences_end_with_one_stop(published: Shell) -> None:
    [maps] = (published.home / "artifacts" / "versions").glob("v2-*/transform.safetensors")
    maps.unlink()
    refused = published("promote", "2")
    assert "gate maps: " in refused.log
    assert ".." not in refused.log


def test_a_diff_for_a_person_and_for_a_script(published: Shell) -> None:
    shown = published("diff", "2")
    assert shown.code == 0
    assert re.search(r"│ item\s+│\s+12 │\s+12 │\s+12 │\s+0 │\s+0 │", shown.output)
    for kind in ("item", "user"):
        assert f"What changes in {kind} vectors, by version" in shown.output
        assert f"{kind}s of version 0 that change most: " in shown.output
    for figure in ("absolute", "relative", "cosine"):
        assert len(re.findall(rf"│ {figure}", shown.output)) == 2
    document = json.loads(published("diff", "2", "--json", "--entity", "user").output)
    assert list(document["ids"]) == ["user"]
    (found,) = document["versions"]
    assert (found["version"], list(found["entities"])) == (0, ["user"])
    assert found["entities"]["user"]["compared"] == 5
    refused = published("diff", "1")
    assert refused.code == 1
    assert refused.log.startswith("error: Version 1 is live already")


def test_deployments_are_listed_and_one_is_shown_with_its_diff(published: Shell) -> None:
    listed = json.loads(published("deployments", "--json").output)
    assert [(d["generation"], d["version"]) for d in listed] == [(2, 1), (1, 0)]
    assert re.search(r"│\s+2 │ promote │\s+1 │ v1-\S+\.0", published("deployments").output)
    one = json.loads(published("deployments", "2", "--json").output)
    assert [found["version"] for found in one["diff"]["versions"]] == [0]
    shown = published("deployments", "2").output
    assert re.search(r"coverage-user │ passed │\s+1 │", shown)
    assert "What changes in item vectors, by version" in shown
    assert "What was served was not compared." in published("deployments", "1").output
    unknown = published("deployments", "9")
    assert (unknown.code, unknown.log) == (
        1,
        "error: No deployment 9; `backcast deployments` lists them.\n",
    )


def test_a_promotion_that_loses_versions_needs_force_and_a_reason(published: Shell) -> None:
    for arguments, message in (
        ((), "gate lineage"),
        (("--force",), "A forced promotion needs a reason"),
        (("--expected-live", "0"), "Version 0 was expected to be live, version 1 is"),
    ):
        refused = published("promote", "2", *arguments)
        assert (refused.code, refused.output) == (1, "")
        assert message in refused.log.splitlines()[-1]
    assert json.loads(published("versions", "--json").output)["live_version"] == 1
    forced = published("promote", "2", "--force", "--reason", "version 1 is bad")
    assert forced.code == 0
    assert forced.output.startswith("Version 2 is live, from snapshot v2-")
    states = json.loads(published("versions", "--json").output)["versions"]
    assert [v["state"] for v in states] == ["superseded", "rolled_back", "live"]


def test_a_promotion_tells_what_reduced_precision_cost(published: Shell) -> None:
    reduced = {"BACKCAST_STORE_PRECISION": "bfloat16"}
    forced = ("--force", "--reason", "to see it", "--json")
    live = json.loads(published("promote", "2", *forced, **reduced).output)
    assert (live["live_version"], live["stored"]["precision"]) == (2, "bfloat16")
    assert 0 < live["stored"]["mean_error"] <= live["stored"]["largest_error"] < 2**-8
    with open_backcast(Settings.load(home=published.home)) as backcast:
        stored = backcast.store.open(live["snapshot"].removesuffix(".0")).rounding
    again = published("promote", "0", *forced[:-1])  # held since it was live, at float32
    assert again.output.endswith("\nStored as float32, nothing lost.\n")
    third = published("promote", "2", *forced[:-1])
    assert third.output.endswith(
        f"\nStored as bfloat16, relative error {stored.mean_error:.1e} on average, "
        f"{stored.largest_error:.1e} at most.\n"
    )


def test_a_rollback_shows_its_plan_and_needs_a_reason(published: Shell) -> None:
    plan = json.loads(published("rollback", "--dry-run", "--json").output)
    assert (plan["live_version"], plan["version"], plan["refused_versions"]) == (1, 0, [1])
    shown = published("rollback", "--dry-run").output
    assert re.match(r"Version 0 would be live, from snapshot v0-\S+\.0\.\n", shown)
    assert "\nServable would be version 0.\nRefused with 409 would be version 1.\n" in shown
    refused = published("rollback")
    assert refused.code == 1
    assert refused.log.startswith("error: A rollback needs --reason")
    done = published("rollback", "--reason", "clicks fell")
    assert (done.code, done.output.startswith("Version 0 is live, from snapshot v0-")) == (0, True)
    assert "live_version 0, " in " ".join(published("audit", "--limit", "1").output.split())
    states = json.loads(published("versions", "--json").output)["versions"]
    assert [(v["state"], v["note"]) for v in states] == [
        ("live", None),
        ("rolled_back", "clicks fell"),
        ("registered", None),
    ]
    again = published("rollback", "--reason", "further")
    assert (again.code, again.output) == (1, "")
    assert "Nothing was live before version 0" in again.log


def test_a_rollback_to_a_named_snapshot(published: Shell) -> None:
    plan = json.loads(published("rollback", "--dry-run", "--json").output)
    snapshot = plan["snapshot"].partition(".")[0]
    arguments = ("--to-snapshot", snapshot, "--expected-live", "1", "--reason", "x", "--json")
    live = json.loads(published("rollback", *arguments).output)
    assert (live["live_version"], live["snapshot"]) == (0, f"{snapshot}.0")


def test_what_cannot_be_deleted_after_an_order_is_noted(
    published: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_backcast(Settings.load(home=published.home)) as backcast:
        live = backcast.registry.deployments.live()
        assert live is not None

    def refuse(_: Any, path: str, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(LocalFileSystem, "rm", refuse)
    done = published("rollback", "--reason", "clicks fell", "--json", BACKCAST_GRACE_SECONDS="0")
    assert done.code == 0
    assert json.loads(done.output)["live_version"] == live.version - 1
    told = done.log.splitlines()[-1]
    assert told.startswith("What is over its grace period is still there, for a replica or gc: ")
    assert f"Snapshot {live.snapshot} is not deleted" in told


def test_operations_for_a_person_and_a_script(published: Shell) -> None:
    assert published("operations").output == "There was no operation yet.\n"
    assert json.loads(published("operations", "--json").output) == []
    published("rollback", "--reason", "clicks fell")
    published("promote", "2", "--expected-live", "0")
    published("promote", "1", "--expected-live", "2")
    listed = json.loads(published("operations", "--json").output)
    assert [(o["kind"], o["state"], o["resumable"]) for o in listed] == [
        ("promote", "failed", False),
        ("promote", "succeeded", False),
        ("rollback", "succeeded", False),
    ]
    one = published("operations", listed[2]["id"], "--json")
    assert json.loads(one.output) == [listed[2]]
    assert "No operation 'none'" in published("operations", "none").log
    shown = published("operations", "--limit", "2").output
    assert listed[0]["id"] in shown
    assert listed[2]["id"] not in shown
    assert "gate lineage" in shown


def test_snapshots_for_a_person_and_a_script(published: Shell) -> None:
    listed = json.loads(published("snapshots", "--json").output)
    assert [(s["version"], s["state"], s["deltas"]) for s in listed] == [
        (0, "superseded", 0),
        (1, "live", 0),
        (2, "published", 0),
    ]
    assert [s["kept_until"] is None for s in listed] == [False, True, True]
    assert all(s["counts"]["item"] and s["counts"]["user"] for s in listed)
    shown = published("snapshots").output
    assert all(s["id"] in shown for s in listed)
    plan = published("promote", "2", "--snapshot", listed[2]["id"], "--dry-run", "--json")
    assert json.loads(plan.output)["snapshot"] == listed[2]["id"]
    assert "is of version 0" in published("promote", "2", "--snapshot", listed[0]["id"]).log


def test_no_snapshot_yet(shell: Shell) -> None:
    assert shell("snapshots").output.startswith("No snapshot is published yet.")


def test_a_refresh_takes_up_the_newest_snapshot(published: Shell) -> None:
    nothing_new = published("refresh")
    assert (nothing_new.code, nothing_new.output) == (1, "")
    assert "Version 1 is live already, with its newest snapshot" in nothing_new.log
    with open_backcast(Settings.load(home=published.home)) as backcast:
        record = backcast.registry.snapshots.latest(1)
        assert record is not None
        rows = read_snapshot(backcast.artifacts, record)
        snapshot = publish(backcast.registry, backcast.artifacts, 1, rows, {})
    plan = json.loads(published("refresh", "--dry-run", "--json").output)
    assert (plan["snapshot"], plan["passed"]) == (snapshot.id, True)
    live = json.loads(published("refresh", "--json").output)
    assert (live["live_version"], live["snapshot"]) == (1, f"{snapshot.id}.0")


def test_the_collector_shows_what_it_would_delete(published: Shell) -> None:
    assert published("gc").output == "There is nothing to delete.\n"
    at_once = {"BACKCAST_GRACE_SECONDS": "0"}
    planned = published("gc", "--dry-run", "--json", **at_once)
    [doomed] = json.loads(planned.output)
    assert (doomed["what"], doomed["name"][:3], doomed["bytes"] > 0) == ("snapshot", "v0-", True)
    shown = published("gc", "--dry-run", **at_once).output
    assert doomed["name"] in shown
    assert shown.endswith(f"Would delete 1 thing, {doomed['bytes']} bytes known.\n")
    deleted = published("gc", "--litter", **at_once).output
    assert deleted.endswith(f"Deleted 1 thing, {doomed['bytes']} bytes known.\n")
    assert json.loads(published("gc", "--dry-run", "--litter", "--json", **at_once).output) == []


def test_keys_for_a_person(published: Shell) -> None:
    secret = published("keys", "create", "--consumer", "ranking", "--pin", "0").output
    assert re.fullmatch(r"bc_[0-9a-f]{8}_\S{40,}\n", secret)
    prefix = secret.split("_")[1]
    assert re.search(rf"{prefix} │ ranking\s+│ read\s+│\s+0 │ in force", listed_keys(published))
    assert published("keys", "revoke", prefix).output == f"Key {prefix} is revoked.\n"
    assert re.search(rf"{prefix} │ ranking\s+│ read\s+│\s+0 │ revoked", listed_keys(published))
    assert secret.strip() not in listed_keys(published)


def listed_keys(shell: Shell) -> str:
    return shell("keys", "list").output


def test_a_version_ends_announced_and_unused(published: Shell) -> None:
    published("keys", "create", "--consumer", "ranking", "--pin", "0")
    told = published("deprecate", "0", "--sunset", "2099-01-31", "--reason", "use version 1")
    assert told.output == ("Version 0 is deprecated, and served until 2099-01-31T00:00:00+00:00.\n")
    ending = json.loads(
        published("deprecate", "0", "--sunset", "2099-01-31T18:00Z", "--json").output
    )
    assert ending["sunset_at"] == "2099-01-31T18:00:00+00:00"
    refused = published("retire", "0")
    assert refused.code == 1
    assert refused.log.startswith("error: Version 0 cannot be retired yet: pinned to it: ranking;")
    assert "pinned to it: ranking; announced to last until 2099-01-31T18:00" in refused.log
    assert published("pin", "ranking", "1").output == "Consumer ranking is pinned to version 1.\n"
    assert published("deprecate", "0", "--withdraw").output.endswith("not deprecated any more.\n")
    assert published("retire", "0").output.startswith("Version 0 is retired;")
    ending = json.loads(published("retire", "0", "--json").output)
    assert (ending["number"], ending["state"], ending["note"]) == (0, "retired", None)
    assert published("pin", "ranking", "0").log == "error: Version 0 is retired.\n"


def test_retirement_looks_back_as_far_as_it_is_told(published: Shell) -> None:
    published("keys", "create", "--consumer", "ranking")
    with open_registry(Settings.load(home=published.home)) as registry:
        registry.usage.add([Use("ranking", 0, utc_now().date() - timedelta(days=20), 3, 30)])
    refused = published("retire", "0", BACKCAST_RETIRE_IDLE_DAYS="30")
    assert refused.code == 1
    assert re.search(r"used it lately: ranking \(last on \d{4}-\d\d-\d\d\)", refused.log)
    forced = published(
        *("retire", "0", "--force", "--reason", "ranking has moved", "--json"),
        BACKCAST_RETIRE_IDLE_DAYS="30",
    )
    assert json.loads(forced.output)["note"] == "ranking has moved"


def test_who_uses_what(published: Shell) -> None:
    published("keys", "create", "--consumer", "ranking", "--pin", "0")
    published("keys", "create", "--consumer", "ads")
    published("pin", "ads", "1")
    published("pin", "ads", "--clear")
    today = utc_now().date()
    with open_registry(Settings.load(home=published.home)) as registry:
        for name, version, age in (("ranking", 0, 0), ("ranking", 0, 2), ("ads", 1, 40)):
            registry.usage.add([Use(name, version, today - timedelta(days=age), 3, 30)])
    uses = json.loads(published("usage", "--json").output)
    assert uses["since"] == f"{today - timedelta(days=29)}"
    assert [(use["consumer"], use["day"], use["requests"]) for use in uses["usage"]] == [
        ("ranking", f"{today}", 3),
        ("ranking", f"{today - timedelta(days=2)}", 3),
    ]
    shown = published("usage", "--days", "90").output
    assert re.search(rf"ranking\s+│\s+0 │\s+6 │\s+60 │ {today} │", shown)
    assert re.search(rf"ads\s+│\s+1 │\s+3 │\s+30 │ {today - timedelta(days=40)} │", shown)
    assert "ranking" not in published("usage", "--days", "90", "--version", "1").output
    consumers = json.loads(published("consumers", "--json").output)
    assert [(c["name"], c["pin"], c["keys_in_force"], c["last_used"]) for c in consumers] == [
        ("ads", None, 1, f"{today - timedelta(days=40)}"),
        ("ranking", 0, 1, f"{today}"),
    ]
    assert re.search(rf"ranking\s+│\s+0 │\s+1 │ {today} │", published("consumers").output)


def test_schema_commands(shell: Shell) -> None:
    url = f"sqlite:///{shell.home}/registry.db"
    upgraded = shell("db", "upgrade", BACKCAST_DATABASE_URL=url)
    checked = shell("db", "check", BACKCAST_DATABASE_URL=url)
    assert (upgraded.code, checked.code) == (0, 0)
    assert upgraded.output == checked.output
    assert re.fullmatch(r"The registry's schema is at \w+\.\n", checked.output)
    dropped = shell("db", "downgrade", "base", BACKCAST_DATABASE_URL=url)
    assert (dropped.code, dropped.output) == (0, "The registry's schema is at base.\n")
    assert shell("db", "check", BACKCAST_DATABASE_URL=url).code == 1


# --- the whole way, as a person goes it -----------------------------------------------------------


class Terminal:
    """Runs the console script in a process each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str) -> str:
        run = subprocess.run(
            command(*arguments),
            env=environment(self.folder / "home"),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


def test_from_data_to_a_live_version(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    backcast = Terminal(tmp_path)
    sizes = ("--users", "120", "--items", "60", "--interactions", "1500")
    made = backcast.json("data", "synth", "--out", "shop", *sizes)
    assert made["counts"]["interactions"] == 1500

    schedule = ("--config", "tiny.toml", "--seed", "3")
    trained = backcast.json(
        "train", "--data", "shop", "--until", "0.6", "--horizon", "0.7", *schedule
    )
    assert (trained["version"], trained["parent"], trained["dim"]) == (0, None, 8)
    assert (trained["config"]["seed"], trained["config"]["epochs"]) == (3, 4)
    assert 0 < trained["metrics"]["recall_at_50"] <= 1

    snapshot = backcast.json("publish", "0", "--until", "0.8")
    assert (snapshot["version"], snapshot["dim"]) == (0, 8)
    assert snapshot["counts"]["user"] <= 120
    assert snapshot["counts"]["item"] <= 60

    plan = backcast.json("promote", "0", "--dry-run")
    assert (plan["passed"], plan["snapshot"], plan["servable_versions"]) == (
        True,
        snapshot["id"],
        [0],
    )
    settings = Settings.load(home=tmp_path / "home")
    with open_registry(settings) as registry:
        assert registry.deployments.live() is None

    live = backcast.json("promote", "0")
    assert (live["live_version"], live["snapshot"]) == (0, f"{snapshot['id']}.0")
    listed = backcast.json("versions")
    assert (listed["live_version"], listed["versions"][0]["state"]) == (0, "live")

    key = backcast.json("keys", "create", "--consumer", "ranking", "--pin", "0")
    assert key["key"].startswith(f"bc_{key['prefix']}_")
    backcast("keys", "revoke", key["prefix"])
    (kept,) = backcast.json("keys", "list")
    assert (kept["prefix"], kept["consumer"], kept["pin"]) == (key["prefix"], "ranking", 0)
    assert kept["state"] == "revoked"
    assert key["key"] not in json.dumps(kept)
    recorded = backcast.json("audit")
    assert [(act["act"], act["target"], act["outcome"]) for act in reversed(recorded)] == [
        ("train", None, "succeeded"),
        ("publish", "version 0", "succeeded"),
        ("promote", "version 0", "succeeded"),
        ("create-key", "consumer ranking", "succeeded"),
        ("revoke-key", f"key {key['prefix']}", "succeeded"),
    ]
    assert recorded[-1]["details"]["version"] == 0


# --- without the applications, and without torch --------------------------------------------------

RUN_WITHOUT = """
import contextlib, io, json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

HIDDEN, calls = map(json.loads, sys.argv[1:])
sys.meta_path.insert(0, Hidden())
from backcast.cli import main

results = []
for arguments in calls:
    sys.argv = ["backcast", *arguments]
    output, log, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(log):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    results.append([code, output.getvalue(), log.getvalue()])
print(json.dumps(results))
"""


def run_without(modules: Sequence[str], home: Path, calls: Sequence[Sequence[str]]) -> list[Result]:
    """Run some commands where ``modules`` cannot be imported."""
    run = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT, json.dumps(modules), json.dumps(calls)],
        env=environment(home, COLUMNS="200"),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [Result(*result) for result in json.loads(run.stdout)]


def test_commands_of_an_absent_application_say_what_to_install(tmp_path: Path) -> None:
    calls = {
        "train": ("train", "--data", "shop", "--until", "0.5"),
        "publish": ("publish", "1"),
        "data": ("data", "synth", "--out", "shop"),
        "demo": ("demo", "--help"),
        "serve": ("serve", "--port", "8000"),
    }
    others = [("--help",), ("versions",), ("keys", "list", "--json")]
    results = run_without(["trainer", "service"], tmp_path, [*calls.values(), *others])
    extras = ["train", "train", "train", "train", "service"]
    for name, extra, result in zip(calls, extras, results[: len(calls)], strict=True):
        assert (result.code, result.output) == (1, "")
        assert re.fullmatch(rf"error: `backcast {name}` needs .+\n", result.log)
        assert f"pip install -e '.[{extra}]'" in result.log
    overview, versions, keys = results[len(calls) :]
    assert (overview.code, versions.code, keys.code) == (0, 0, 0)
    for name in calls:
        assert re.search(rf"│ {name}\s+Not installed: needs a checkout", overview.output)
    assert json.loads(keys.output) == []


def test_commands_without_their_packages_say_what_to_install(tmp_path: Path, data: str) -> None:
    needs = {
        ("train", "--data", data, "--until", "0.5"): ("torch", "train"),
        ("publish", "0", "--data", data): ("torch", "train"),
        ("serve",): ("uvicorn", "service"),
    }
    results = run_without(["torch", "uvicorn"], tmp_path, list(needs))
    for (package, extra), result in zip(needs.values(), results, strict=True):
        assert (result.code, result.output) == (1, "")
        wanted = rf"error: .* the package {package}: pip install '.*\[{extra}\]'\.\n"
        assert re.fullmatch(wanted, result.log), result.log


def test_what_needs_no_package_works_without_it(tmp_path: Path) -> None:
    calls = [("--help",), ("train", "--help"), ("versions",), ("data", "synth", "--help")]
    for result in run_without(["torch", "uvicorn"], tmp_path, calls):
        assert (result.code, result.log) == (0, "")


@pytest.mark.parametrize("module", ["backcast", "backcast.cli", "backcast.cli.commands"])
def test_the_core_needs_neither_torch_nor_a_web_framework(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(run.stdout)}
    heavy = {"torch", "torch_geometric", "fastapi", "starlette", "uvicorn", "trainer", "service"}
    assert loaded & heavy == set()
    assert "backcast" in loaded


def _interrupted(wrapped: bool) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        if wrapped:
            raise SystemError("returned a result with an exception set") from error
        raise


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interrupt_is_one_line_even_as_another_errors_cause(
    wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, interruptible("Stopped."):
        _interrupted(wrapped)
    assert stopped.value.exit_code == 130
    assert capsys.readouterr() == ("", "Stopped.\n")


def test_other_errors_are_no_interrupts() -> None:
    with pytest.raises(ValueError, match="wrong"), interruptible("Stopped."):
        raise ValueError("wrong")


def test_training_without_a_method_named_is_by_the_default_one() -> None:
    assert inspect.signature(train).parameters["method"].default == DEFAULT_METHOD
