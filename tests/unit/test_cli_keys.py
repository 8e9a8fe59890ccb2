"""The commands about keys, and the audit log of every command that changes something."""

import json
import re
import shlex
import socket
import sqlite3
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backcast.acts import ActName
from backcast.cli import main
from backcast.cli.acting import actor
from backcast.registry import open_registry
from backcast.settings import Settings
from backcast.vector_files import write_vector_file
from backcast.vectors import VectorBatch
from backcast.versions import Entity, Key
from tests.support import Home, build_home
from tests.unit.test_cli import COMMANDS, found_command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Version 1 is live, 0 superseded; 2 is published."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKCAST_HOME", str(tmp_path / "home"))
    with build_home(tmp_path / "home", dims=(4, 6, 8), live=1) as built:
        yield built


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process; return its exit status and both outputs."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["backcast", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


def made(shell: Any, *arguments: str) -> dict[str, Any]:
    code, output, log = shell("keys", *arguments, "--json")
    assert code == 0, log
    document: dict[str, Any] = json.loads(output)
    return document


def keys(home: Home) -> list[Key]:
    return home.backcast.registry.keys.all()


class TestExpiry:
    @pytest.mark.parametrize(
        ("text", "days"), [("30d", 30), ("48h", 2), ("2w", 14)], ids=lambda value: str(value)
    )
    def test_after_how_long(self, home: Home, shell: Any, text: str, days: int) -> None:
        before = home.backcast.registry.now()
        key = made(shell, "create", "--consumer", "ads", "--expires", text)
        passed = datetime.fromisoformat(key["expires_at"]) - before
        assert timedelta(days=days) <= passed < timedelta(days=days, minutes=5)
        assert key["state"] == "in force"

    def test_when(self, home: Home, shell: Any) -> None:
        for text, moment in (
            ("2099-01-31", "2099-01-31T00:00:00+00:00"),
            ("2099-01-31T01:00+01:00", "2099-01-31T00:00:00+00:00"),
        ):
            key = made(shell, "create", "--consumer", "ads", "--expires", text)
            assert key["expires_at"] == moment
        assert "2099-01-31 00:00" in shell("keys", "list")[1]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("soon", "--expires 'soon' is no moment"),
            ("1y", "T18:00+01:00, or a duration such as 30d."),
            ("0s", "is over"),
            ("2020-01-31", "is over"),
        ],
    )
    def test_what_is_none(self, home: Home, shell: Any, text: str, words: str) -> None:
        code, output, log = shell("keys", "create", "--consumer", "ads", "--expires", text)
        assert (code, output) == (1, "")
        assert words in log
        assert keys(home) == []


class TestRotation:
    def test_old_key_stays_for_a_day_and_names_its_successor(self, home: Home, shell: Any) -> None:
        old = made(shell, "create", "--consumer", "ads", "--scope", "admin", "--pin", "0")
        new = made(shell, "rotate", old["prefix"])
        assert (new["consumer"], new["scope"], new["pin"]) == ("ads", "admin", 0)
        assert new["key"].startswith(f"bc_{new['prefix']}_")
        kept, _ = keys(home)
        assert kept.successor == new["prefix"]
        assert kept.expires_at is not None
        left = kept.expires_at - home.backcast.registry.now()
        assert timedelta(hours=23) < left <= timedelta(hours=24)
        assert re.search(
            rf"{old['prefix']} .* in force .* {new['prefix']}", shell("keys", "list")[1]
        )

    def test_without_overlap_it_is_revoked(self, home: Home, shell: Any) -> None:
        old = made(shell, "create", "--consumer", "ads")
        code, secret, _ = shell("keys", "rotate", old["key"], "--overlap", "0")
        assert code == 0
        assert re.fullmatch(r"bc_[0-9a-f]{8}_\S{43}\n", secret)
        assert [key.revoked_at is not None for key in keys(home)] == [True, False]
        code, _, log = shell("keys", "rotate", old["prefix"])
        assert code == 1
        assert "was rotated to" in log

    @pytest.mark.parametrize("act", ["rotate", "revoke"])
    def test_mistyped_key_is_repeated_nowhere(self, home: Home, shell: Any, act: str) -> None:
        secret = made(shell, "create", "--consumer", "ads")["key"]
        for wrong in (secret[:9] + secret[10:], secret + "x", secret[3:]):
            code, output, log = shell("keys", act, wrong)
            assert (code, output) == (1, "")
            assert "eight hexadecimal digits" in log
            assert secret[-20:] not in log
        assert secret[-20:] not in shell("audit", "--json")[1]


def acts_of(shell: Any, *options: str) -> list[dict[str, Any]]:
    code, output, log = shell("audit", "--json", *options)
    assert code == 0, log
    acts: list[dict[str, Any]] = json.loads(output)
    return acts


ACTING = {
    *(
        ("keys", "create"),
        ("keys", "rotate"),
        ("keys", "revoke"),
        ("pin",),
        ("upsert",),
        ("erase",),
    ),
    *(("deprecate",), ("retire",), ("promote",), ("rollback",), ("refresh",), ("gc",)),
    *(("train",), ("publish",), ("infer",)),
    *(("restore",), ("migrate-store",), ("erasures", "apply")),
}
OTHERS = {
    *(("data", "amazon"), ("data", "csv"), ("data", "synth"), ("methods",), ("benchmark",)),
    *(("demo",), ("serve",), ("get",), ("db", "upgrade"), ("db", "downgrade")),
    *(("backup",), ("verify",), ("erasures", "export")),
}
"""Commands that touch no registry, or one of their own, or its schema, or read it; the service."""


def test_of_every_command_it_is_known_whether_it_acts() -> None:
    looking = {tuple(word for word in path if word.isalpha()) for path in LOOKS}
    looking = {path[:2] if path[0] in {"keys", "db"} else path[:1] for path in looking}
    assert set(COMMANDS) == ACTING | OTHERS | looking


def test_every_command_that_changes_something_is_recorded(home: Home, shell: Any) -> None:
    write_vector_file(
        Path("new.parquet"),
        6,
        [VectorBatch(Entity.USER, ["ann@example.org"], np.ones((1, 6), np.float32))],
        {"version": 1},
    )
    shell("keys", "create", "--consumer", "ads", "--reason", "new team")
    [key] = keys(home)
    for arguments, code in (
        (("keys", "rotate", key.prefix, "--overlap", "1h"), 0),
        (("keys", "revoke", key.prefix, "--reason", "leaked"), 0),
        (("pin", "ads", "1"), 0),
        (("pin", "ads", "9"), 1),
        (("upsert", "new.parquet"), 0),
        (("erase", "ann@example.org", "--entity", "user"), 0),
        (("deprecate", "0", "--sunset", "2099-01-31", "--reason", "old"), 0),
        (("deprecate", "0", "--withdraw"), 0),
        (("retire", "1"), 1),
        (("retire", "0", "--force", "--reason", "gone"), 0),
        (("promote", "2", "--expected-live", "0"), 1),
        (("promote", "2", "--expected-live", "1", "--force", "--reason", "now"), 0),
        (("rollback", "--reason", "clicks fell", "--expected-live", "2"), 0),
        (("refresh", "--compact"), 0),
        (("gc",), 0),
        (("publish", "9"), 1),
    ):
        assert shell(*arguments)[0] == code, (arguments, shell(*arguments))
    recorded = acts_of(shell)
    assert {(act["actor"], act["key"]) for act in recorded} == {(actor(), None)}
    assert [
        (act["act"], act["target"], act["reason"], act["outcome"], act["code"])
        for act in reversed(recorded)
    ] == [
        ("create-key", "consumer ads", "new team", "succeeded", None),
        ("rotate-key", f"key {key.prefix}", None, "succeeded", None),
        ("revoke-key", f"key {key.prefix}", "leaked", "succeeded", None),
        ("pin", "consumer ads", None, "succeeded", None),
        ("pin", "consumer ads", None, "refused", "unknown-version"),
        ("upsert", None, None, "succeeded", None),
        ("erase", None, None, "succeeded", None),
        ("deprecate", "version 0", "old", "succeeded", None),
        ("withdraw-deprecation", "version 0", None, "succeeded", None),
        ("retire", "version 1", None, "refused", "conflict"),
        ("retire", "version 0", "gone", "succeeded", None),
        ("promote", "version 2", None, "refused", "promotion-conflict"),
        ("promote", "version 2", "now", "succeeded", None),
        ("rollback", None, "clicks fell", "succeeded", None),
        ("refresh", "version 1", None, "succeeded", None),
        ("gc", None, None, "succeeded", None),
        ("publish", "version 9", None, "refused", "unknown-version"),
    ]
    by_act = {act["act"]: act for act in reversed(recorded)}
    assert by_act["promote"]["operation"] is not None
    assert by_act["promote"]["details"]["force"] is True
    assert by_act["erase"]["details"]["ids"] == {"user": 1}
    assert by_act["upsert"]["details"]["ids"] == {"user": 1}
    assert "ann@example.org" not in json.dumps(recorded)


@pytest.mark.parametrize("path", sorted(ACTING), ids=" ".join)
def test_every_command_that_acts_takes_a_reason(path: tuple[str, ...]) -> None:
    [option] = [param for param in found_command(path).params if param.name == "reason"]
    assert option.opts == ["--reason"]


REASONED = [
    ("create-key", "keys create --consumer ads"),
    ("rotate-key", "keys rotate 00000000"),
    ("revoke-key", "keys revoke 00000000"),
    ("pin", "pin ads 1"),
    ("upsert", "upsert new.parquet"),
    ("erase", "erase 'item 1'"),
    ("erase", "erasures apply erased.json"),
    ("deprecate", "deprecate 0 --sunset 2099-01-31"),
    ("withdraw-deprecation", "deprecate 0 --withdraw"),
    ("retire", "retire 0"),
    ("promote", "promote 2"),
    ("rollback", "rollback"),
    ("cancel", "operations 0f --cancel"),
    ("refresh", "refresh"),
    ("gc", "gc"),
    ("train", "train --data shop --until 1 --parent 9"),
    ("publish", "publish 9"),
]
"""Acts, and commands that are recorded in the home that they are run in."""


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("name", "line"), REASONED, ids=[line for _, line in REASONED])
def test_reason_of_a_command_is_kept(shell: Any, name: str, line: str) -> None:
    vectors = VectorBatch(Entity.ITEM, ["i"], np.ones((1, 6), np.float32))
    write_vector_file(Path("new.parquet"), 6, [vectors], {})
    Path("edges.csv").write_text("user_id,item_id,rating,timestamp\nu,i,5,100\nv,j,1,200\n")
    shell("data", "csv", "--interactions", "edges.csv", "--out", "shop")
    shell("erasures", "export", "erased.json")
    told = shell(*shlex.split(line), "--reason", "it was agreed")
    acts = acts_of(shell)
    assert [(act["act"], act["reason"]) for act in acts] == [(name, "it was agreed")], told


def test_what_other_commands_do_is_recorded_in_other_places() -> None:
    assert set(ActName) - {name for name, _ in REASONED} == {ActName.RESTORE, ActName.MOVE}


LOOKS = (
    *(("versions",), ("snapshots",), ("consumers",), ("usage",), ("operations",), ("deployments",)),
    *(("keys", "list"), ("audit",), ("promote", "2", "--dry-run"), ("rollback", "--dry-run")),
    *(("diff", "2"), ("gc", "--dry-run"), ("db", "check")),
    ("export", "--version", "0", "--out", "out.parquet"),
)


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
@pytest.mark.usefixtures("home")
def test_command_that_only_looks_is_not(shell: Any, arguments: tuple[str, ...]) -> None:
    code, _, log = shell(*arguments)
    assert code == 0, log
    assert acts_of(shell) == []


@pytest.mark.usefixtures("home")
def test_log_is_a_table_for_a_person(shell: Any) -> None:
    assert shell("audit")[1] == "Nothing was done yet.\n"
    shell("keys", "create", "--consumer", "ads")
    shell("retire", "1")
    table = " ".join(shell("audit")[1].split())
    assert re.search(r"│ 2 │ \d{4}-\d\d-\d\d .*retire .*version 1 .*refused: ", table)
    assert actor() in shell("audit", "--limit", "1")[1].replace("\n", "")
    assert [act["act"] for act in acts_of(shell, "--limit", "1")] == ["retire"]
    assert len(acts_of(shell, "--since", "1h")) == 2
    assert acts_of(shell, "--since", "2099-01-31") == []
    assert shell("audit", "--since", "0s")[1] == "Nothing was done since 0s.\n"


@pytest.mark.usefixtures("home")
def test_table_tells_a_pin_to_version_0_from_none(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backcast.cli.output.WIDTH_OF_FILES", 240)
    shell("keys", "create", "--consumer", "ads")
    shell("pin", "ads", "0")
    shell("pin", "ads", "--clear")
    cells = [line.strip("│ ").split("│")[-1].strip() for line in shell("audit")[1].splitlines()]
    [key] = [act["details"]["key"] for act in acts_of(shell) if "key" in act["details"]]
    assert cells[3:-1] == ["pin none", "pin 0", f"scope read, key {key}"]


def test_actor_is_the_user_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = actor()
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setenv("USER", "somebody-else")
    assert actor() == found
    assert found.endswith(f"@{socket.gethostname()}"[:20])
    monkeypatch.setattr("os.getuid", lambda: 123_456_789)
    assert actor().startswith("cli:123456789@")


def test_act_that_is_not_recorded_is_not_done(home: Home, shell: Any) -> None:
    with sqlite3.connect(home.settings.home / "registry.db") as registry:
        registry.execute("DROP TABLE audit_outcomes")
        registry.execute("DROP TABLE audit")
    registry.close()
    code, _, log = shell("keys", "create", "--consumer", "ads")
    assert code == 1
    assert "no such table: audit" in log
    assert keys(home) == []


def test_secret_is_kept_nowhere(home: Home, shell: Any) -> None:
    secret = made(shell, "create", "--consumer", "ads")["key"]
    rotated = made(shell, "rotate", secret)["key"]
    for shown in (shell("audit", "--json")[1], shell("keys", "list", "--json")[1]):
        assert secret[-20:] not in shown
        assert rotated[-20:] not in shown
    with open_registry(Settings.load()) as registry:
        assert len(registry.keys.all()) == 2
    for file in home.settings.home.glob("registry.db*"):
        assert secret[-20:].encode() not in file.read_bytes()
