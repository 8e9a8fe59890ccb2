"""What workers leave each other in a folder."""

import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from backcast.errors import ConfigError
from service.metrics import families
from service.metrics.exposition import put_together
from service.metrics.sheets import Sheet, claimed

STARTS, WORKERS = families.WORKER_STARTS.key(), families.WORKERS.key()


def sheet(starts: float) -> Sheet:
    return Sheet({STARTS: [starts]}, {WORKERS: 1.0})


def test_living_workers_have_files_of_their_own_and_see_each_other(tmp_path: Path) -> None:
    with claimed(tmp_path) as one, claimed(tmp_path) as two, claimed(tmp_path) as three:
        one.write(sheet(1))
        two.write(sheet(2))
        assert one.others() == [sheet(2)]
        assert two.others() == [sheet(1)]
        assert three.others() == [sheet(1), sheet(2)]


def test_an_ended_worker_is_counted_and_stands_no_more(tmp_path: Path) -> None:
    with claimed(tmp_path) as one:
        with claimed(tmp_path) as two:
            two.write(sheet(2))
        assert one.others() == [Sheet({STARTS: [2]})]


def test_the_next_worker_takes_over_what_an_ended_one_left(tmp_path: Path) -> None:
    with claimed(tmp_path):
        with claimed(tmp_path) as two:
            two.write(sheet(2))
        with claimed(tmp_path) as next:
            assert next.taken_over() == sheet(2)
            next.write(sheet(3))
            assert next.others() == []


def test_there_are_no_more_files_than_workers_lived_at_one_time(tmp_path: Path) -> None:
    for _ in range(20):
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(claimed(tmp_path)).write(sheet(1))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}.{kind}" for n in range(3) for kind in ("json", "lock")
    }


def test_nothing_was_left_in_a_new_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "folder") as file:
        assert file.taken_over() == Sheet()
        assert file.others() == []


def test_series_of_another_release_are_passed_over(tmp_path: Path) -> None:
    other = Sheet({STARTS: [1, 2], ("gone_total", ()): [3], families.PROBLEMS.key("a"): [4]})
    with claimed(tmp_path) as file:
        file.write(other)
        assert file.taken_over() == Sheet({families.PROBLEMS.key("a"): [4]})


def test_gauges_of_another_release_are_passed_over(tmp_path: Path) -> None:
    gone, fewer = ("gone_seconds", ()), (WORKERS[0], ("a",))
    with claimed(tmp_path) as one, claimed(tmp_path) as two:
        two.write(Sheet({STARTS: [1]}, {gone: 3.0, fewer: 2.0, WORKERS: 1.0}))
        assert one.others() == [sheet(1)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"counts":[[["backcast_work',
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b'{"counts":1,"gauges":2}',
        b'{"counts":[["a",[1]]],"gauges":[]}',
        b'{"counts":[],"gauges":[[["a",[]],"x"]]}',
    ],
)
def test_a_file_that_is_no_sheet_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.json").write_bytes(content)
    (tmp_path / "1.json").write_bytes(content)
    for name in ("notes.json", "-1.json", "1.5.json", "x1.json", ".json"):
        (tmp_path / name).write_bytes(content)
    with claimed(tmp_path) as file:
        assert file.taken_over() == Sheet()
        assert file.others() == [Sheet()]
        file.write(sheet(2))
        assert file.taken_over() == sheet(2)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"BACKCAST_METRICS_FOLDER='.*file' cannot be used: "):
        claimed(tmp_path / "file").__enter__()


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    script = (
        "import os; from pathlib import Path; from service.metrics.sheets import *\n"
        f"with claimed(Path({str(tmp_path)!r})) as file:\n"
        "    file.write(Sheet({('backcast_worker_starts_total', ()): [1]}))\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    with claimed(tmp_path) as file:
        assert file.taken_over() == Sheet({STARTS: [1]})


def test_workers_are_put_together_by_the_rule_of_each_family() -> None:
    starts, live = families.WORKER_STARTS.key(), families.LIVE_VERSION.key()
    serving, info = families.SERVING.key(), families.SNAPSHOT.key("v1-a", "1")
    both = put_together(
        [
            Sheet({starts: [1]}, {WORKERS: 1, live: 3, serving: 1, info: 1}),
            Sheet({starts: [2]}, {WORKERS: 1, live: 2, serving: 0}),
            Sheet({starts: [4]}),
        ]
    )
    assert both.counts == {starts: [7]}
    assert both.gauges == {WORKERS: 2, live: 2, serving: 0, info: 1}
