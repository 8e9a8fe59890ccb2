"""What the commands backup, restore, verify, migrate-store and erasures print."""

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from backcast.errors import InvalidInput
from backcast.lifecycle import Listed, backups, erase
from backcast.registry import Operations, copying, open_registry
from backcast.settings import Settings
from backcast.versions import Entity
from tests.support import Home, build_home
from tests.unit.test_cli import Shell


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path / "home", monkeypatch, capsys)


@pytest.fixture
def home(shell: Shell) -> Iterator[Home]:
    with build_home(shell.home, live=1) as built:
        yield built


def reasons(shell: Shell, **variables: str) -> list[str]:
    return [act["reason"] for act in json.loads(shell("audit", "--json", **variables).output)]


@pytest.mark.usefixtures("home")
def test_backup_restore_and_verify_say_what_they_did(shell: Shell, tmp_path: Path) -> None:
    machine = str(tmp_path / "machine")
    done = shell("backup", "kept")
    found = r"(\d+) rows and (\d+) files \(0\.\d MiB\), live is (v1-\S+\.0): kept\n"
    (kept,) = re.findall(found, done.output)
    checked = shell("verify", "--backup", "kept")
    assert (done.code, checked.code) == (0, 0)
    assert "all is there" in checked.output
    back = shell("restore", "kept", "--json", "--reason", "disk died", BACKCAST_HOME=machine)
    assert reasons(shell, BACKCAST_HOME=machine) == ["disk died"]
    document = json.loads(back.output)
    assert [str(document[name]) for name in ("rows", "files", "live")] == list(kept)
    assert document["vectors"] == 34
    looked = json.loads(shell("verify", "--json", BACKCAST_HOME=machine).output)
    assert (looked["live"], looked["vectors"], looked["faults"]) == (kept[2], 34, [])


@pytest.mark.usefixtures("home")
def test_faults_are_lines_and_an_exit_status(shell: Shell) -> None:
    shell("backup", "kept")
    (lost,) = shell.home.glob("artifacts/versions/v0-*/model.safetensors")
    lost.unlink()
    found = shell("verify")
    assert (found.code, found.output) == (1, f"file://{lost} is registered but missing.\n")
    assert found.log.splitlines()[-1] == "error: 1 thing is not as it was registered."
    assert json.loads(shell("verify", "--json").output)["faults"] == [found.output.strip()]
    assert "verify" in shell("verify", "--backup", "kept").log


def test_verify_of_nothing_fails_and_makes_nothing(shell: Shell) -> None:
    found = shell("verify")
    assert (found.code, found.output) == (1, "")
    assert found.log.startswith(f"error: There is no registry {shell.home}/registry.db. Name the")
    assert not shell.home.exists()
    assert shell("versions").code == 0  # makes an empty one
    found = shell("verify")
    assert (found.code, found.output) == (1, "")
    assert found.log.splitlines()[-1].startswith("error: The registry has no versions, so there")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("restore", "nowhere"), "There is no backup, or it was never finished: "),
        (("verify", "--backup", "nowhere"), "There is no backup, or it was never finished: "),
        (("restore", "kept"), "The registry sqlite:"),
        (("backup", "kept"), "There is a backup already: "),
        (("backup", ""), "The place of the backup is an empty text: "),
        (("restore", " "), "The place of the backup is an empty text: "),
        (("verify", "--backup", ""), "The place of the backup is an empty text: "),
        (("restore", "kept", "--erasures", "kept.json"), "kept.json is no list of erasures ("),
        (("erasures", "apply", "kept.json"), "kept.json is no list of erasures ("),
        (("migrate-store",), "--to-database is missing."),
        (("migrate-store", "--to-database", "nothing"), "BACKCAST_DATABASE_URL: "),
        (("migrate-store", "--to-database", "@none"), "--to-database='none' cannot be read: No "),
    ],
)
def test_refusals_are_one_line(
    shell: Shell, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    shell("backup", "kept")
    (tmp_path / "kept.json").write_text('{"format": 1, "erased_sha256": {"item": ["abc"]}}')
    refused = shell(*arguments)
    assert (refused.code, refused.output) == (1, "")
    assert refused.log.startswith(f"error: {message}")
    assert refused.log.count("\n") == 1


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


EMPTY = "Interrupted; the registry is empty still. Run it again.\n"
FILLED = "Interrupted when all was done: the registry is filled.\n"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("command", "last"),
    [
        (("restore", "kept"), (backups, "_live")),
        (
            ("migrate-store", "--to-database", "sqlite:///machine/registry.db"),
            (Operations, "succeed"),
        ),
    ],
)
def test_an_interrupt_is_told_for_what_it_left(
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    last: tuple[object, str],
) -> None:
    (tmp_path / "machine").mkdir()
    shell("backup", "kept")
    here = {"BACKCAST_HOME": "machine"} if command[0] == "restore" else {}
    copy = (copying, "copy_rows")
    for (where, name), words in ((copy, EMPTY), (last, FILLED)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupt)
            ended = shell(*command, **here)
        assert (ended.code, ended.log.splitlines(keepends=True)[-1]) == (130, words)
    with open_registry(Settings.load(home=tmp_path / "machine")) as registry:
        acts = [(act.act, act.outcome) for act in registry.audit.recent(9)]
        assert acts == [({"migrate-store": "move"}.get(command[0], "restore"), "succeeded")]
        assert registry.operations.active() is None


@pytest.mark.usefixtures("home")
def test_places_to_move_to_are_read_from_files(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "database").write_text(f"sqlite:///{tmp_path}/other.db\n")
    (tmp_path / "store").write_text(f"embedded:{tmp_path}/other")
    moved = shell(
        *("migrate-store", "--to-database", "@database", "--to-store", "@store"),
        *("--reason", "larger host"),
    )
    assert moved.code == 0, moved.log
    places = {name: (tmp_path / name).read_text().strip() for name in ("database", "store")}
    variables = {f"BACKCAST_{name.upper()}_URL": url for name, url in places.items()}
    assert shell("verify", **variables).code == 0
    assert reasons(shell, **variables) == ["larger host"]


@pytest.mark.usefixtures("home")
def test_a_password_of_the_backup_s_place_is_not_printed(shell: Shell) -> None:
    place, machine = "kept?password=hunter2", str(shell.home.parent / "machine")
    for arguments in (("backup", place), ("verify", "--backup", place), ("restore", place)):
        here = machine if "restore" in arguments else str(shell.home)
        for form in (("--json",), ()):
            done = shell(*arguments, *form, BACKCAST_HOME=here)
            assert "hunter2" not in done.output + done.log, arguments


def test_erasures_are_carried_to_an_older_state(shell: Shell, home: Home, tmp_path: Path) -> None:
    machine = str(tmp_path / "machine")
    shell("backup", "kept")
    erase(home.backcast, Entity.ITEM, ["item 1", "x"], actor="a", grace=timedelta(hours=1))
    assert shell("erasures", "export", "erased.json").output == "2 erasures: erased.json\n"
    shell("restore", "kept", BACKCAST_HOME=machine)
    for expected in (1, 0):
        applied = shell("erasures", "apply", "erased.json", BACKCAST_HOME=machine)
        assert applied.output == f"{expected} ids that were held here are erased.\n"
    export = shell("export", "--version", "0", "--out", "all.parquet", BACKCAST_HOME=machine)
    assert export.output.startswith("16 vectors")


def test_interrupted_list_of_erasures_is_recorded_so(
    shell: Shell, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase(home.backcast, Entity.ITEM, ["item 1"], actor="a", grace=timedelta(hours=1))
    shell("erasures", "export", "erased.json")
    monkeypatch.setattr("backcast.cli.backups.erase_listed", interrupt)
    ended = shell("erasures", "apply", "erased.json")
    assert (ended.code, ended.log) == (130, "Interrupted; run it again.\n")
    act = home.backcast.registry.audit.recent(1)[0]
    assert (act.act, act.outcome, act.code) == ("erase", "failed", "interrupted")


@pytest.mark.parametrize("digest", ["A" * 64, "a" * 63, f"{'a' * 64}\n", f"{'aa ' * 32}", 7])
def test_digest_that_no_id_has_is_refused(tmp_path: Path, digest: object) -> None:
    file = tmp_path / "erased.json"
    file.write_text(json.dumps({"format": 1, "erased_sha256": {"item": [digest]}}))
    with pytest.raises(InvalidInput, match=r"is no list of erasures \("):
        Listed.read(file)


def test_schema_check_is_json_for_a_script(shell: Shell, home: Home) -> None:
    url = home.settings.registry_url
    checked = shell("db", "check", "--json", BACKCAST_DATABASE_URL=url)
    document = json.loads(checked.output)
    assert (checked.code, document["state"]) == (0, "current")
    assert document["schema"] == document["release"]
    absent = shell("db", "check", "--json", BACKCAST_DATABASE_URL="sqlite:///none.db")
    assert (absent.code, json.loads(absent.output)["state"]) == (1, "absent")
