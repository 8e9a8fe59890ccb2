"""``backcast benchmark`` in processes of its own: killed, stopped, doubled, and told nonsense."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from backcast.cli import app, main
from backcast.errors import InvalidInput
from tests.benchmark_support import CONFIG, quiet, tiny_plan, without_times
from tests.trainer_support import command, environment, synthetic, threads
from trainer.data.dataset import Dataset
from trainer.evaluation.benchmark import run

PATIENCE = 120.0
PLAN = ("--methods", "non-bc,bc-aligner", "--lambdas", "4", "--frontier")
UNITS = 1 + 2 + 1 + 3


class Bench:
    """A folder with data and settings, where ``backcast benchmark`` is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset = synthetic(folder / "shop")
        (folder / "tiny.toml").write_text(CONFIG)

    def start(
        self, out: str, *, epochs: int = 2, processes: int = 1, plan: Sequence[str] = PLAN
    ) -> subprocess.Popen[str]:
        """Begin a benchmark in a process group of its own, as a terminal would."""
        return subprocess.Popen(
            command(
                *("benchmark", "--data", "shop", "--out", out, "--config", "tiny.toml"),
                *("--epochs", str(epochs), "--processes", str(processes), *plan),
            ),
            cwd=self.folder,
            env=environment(self.folder / "home", COLUMNS="200"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Where the tests themselves run in the background, Ctrl-C is ignored, and inherited so.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def __call__(self, out: str, **options: Any) -> str:
        """Run a benchmark to its end and return what it printed."""
        process = self.start(out, **options)
        output, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        return output

    def results(self, out: str) -> Any:
        """Return what was measured, without the times."""
        document = json.loads((self.folder / out / "results.json").read_bytes())
        return without_times(document)

    def work(self, out: str) -> list[str]:
        """Return the finished folders: what lies in them is never written again."""
        root = self.folder / out / "work"
        # Unlike rglob, walk does not mind a draft that is renamed while it looks.
        leaves = {Path(folder) for folder, _, files in os.walk(root) if files}
        return sorted(str(path.relative_to(root)) for path in leaves if ".0." not in str(path))

    def stamps(self, out: str, folders: Sequence[str]) -> dict[str, int]:
        """Return when each file of these folders was written."""
        root = self.folder / out / "work"
        files = [path for folder in folders for path in (root / folder).iterdir()]
        return {str(path): path.stat().st_mtime_ns for path in files}

    def wait_for(self, out: str, pattern: str, process: subprocess.Popen[str]) -> None:
        """Wait until there is finished work of this name."""
        give_up = time.monotonic() + PATIENCE
        while not any(re.search(pattern, folder) for folder in self.work(out)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up
            time.sleep(0.01)


def descendants(parent: int) -> list[int]:
    """Return the processes below one."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid for child in map(int, children) for pid in (child, *descendants(child))]


def wait_until_gone(processes: Sequence[int]) -> None:
    give_up = time.monotonic() + 20
    while left := [pid for pid in processes if is_running(pid)]:
        assert time.monotonic() < give_up, left
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("benchmark"))


LONGER = 16
"""Epochs, so that there is time to interrupt the training of a version."""


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> Any:
    bench("uninterrupted", epochs=LONGER)
    return bench.results("uninterrupted")


@pytest.fixture
def started(bench: Bench, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A benchmark that has made the first model and a version after it, and goes on."""
    out, (processes, epochs) = request.node.name, request.param
    process = bench.start(out, epochs=epochs, processes=processes)
    try:
        bench.wait_for(out, r"models/[a-z]+-\w+/1$", process)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("started", [(2, LONGER)], indirect=True, ids=["with-workers"])
def test_a_killed_run_goes_on_where_it_was_and_processes_do_not_matter(
    bench: Bench,
    started: subprocess.Popen[str],
    uninterrupted: Any,
    request: pytest.FixtureRequest,
) -> None:
    out, workers = request.node.name, descendants(started.pid)
    started.send_signal(signal.SIGKILL)
    started.wait()
    wait_until_gone(workers)
    finished = bench.work(out)
    assert any(folder.endswith("models/first/0") for folder in finished)
    assert len(finished) < len(bench.work("uninterrupted"))
    before = bench.stamps(out, finished)
    bench(out, epochs=LONGER, processes=2)
    assert bench.stamps(out, finished) == before
    assert bench.results(out) == uninterrupted
    assert bench.work(out) == bench.work("uninterrupted")


@pytest.mark.parametrize(
    "started", [(1, 4 * LONGER), (2, 4 * LONGER)], indirect=True, ids=["alone", "with-workers"]
)
def test_ctrl_c_stops_everything_and_says_how_to_go_on(
    bench: Bench, started: subprocess.Popen[str], request: pytest.FixtureRequest
) -> None:
    workers = descendants(started.pid)
    os.killpg(started.pid, signal.SIGINT)
    output, log = started.communicate(timeout=30)
    assert started.returncode == 130, output + log
    assert output == ""
    *lines, last = log.splitlines()
    assert last == "Stopped. What is finished is kept: the same command goes on from there."
    assert all(line.startswith("benchmark ") for line in lines), log
    wait_until_gone(workers)
    drafts = list((bench.folder / request.node.name).rglob(".*"))
    assert drafts == [] or request.node.name.endswith("[with-workers]")


def test_two_runs_of_the_same_command_do_not_disturb_each_other(
    bench: Bench, uninterrupted: Any
) -> None:
    both = [bench.start("both", epochs=LONGER) for _ in range(2)]
    for process in both:
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
    assert bench.results("both") == uninterrupted
    assert bench.work("both") == bench.work("uninterrupted")
    assert list((bench.folder / "both").rglob(".*")) == []


def test_a_worker_that_is_killed_is_one_line(bench: Bench) -> None:
    process = bench.start("bereft", epochs=2000, processes=2)
    give_up = time.monotonic() + PATIENCE
    while not (workers := [pid for pid in descendants(process.pid) if "spawn_main" in line(pid)]):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    output, log = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    *_, last = log.splitlines()
    assert last.startswith("error: A worker process was killed, perhaps for want of memory.")
    assert "Traceback" not in log


def line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


# --- what a person sees ---------------------------------------------------------------------------


@pytest.mark.usefixtures("uninterrupted")
def test_the_table_and_the_report_are_shown_in_the_end(bench: Bench) -> None:
    process = bench.start("uninterrupted", epochs=LONGER)
    output, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert output.startswith("synthetic, protocol strict\n")
    cells = [re.split(r"\s*[│┃]\s*", row)[1:-1] for row in output.splitlines() if row[0] in "│┃"]
    assert [row[:2] for row in cells] == [
        ["method", "λ"],
        ["Keep-All", "-"],
        ["Non-BC", "-"],
        ["BC-Aligner", "4"],
    ]
    assert re.fullmatch(r"\d+\.\d\d", cells[1][2])
    assert output.endswith("\nReport: uninterrupted/report.html\n")
    assert (
        "<title>Backward compatibility on synthetic</title>"
        in (bench.folder / "uninterrupted" / "report.html").read_text()
    )
    assert log.splitlines()[-1] == f"benchmark {UNITS}/{UNITS}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "magic"), "Method 'magic' is unknown; there are keep-all, fix-m0"),
        (("--methods", ","), "expected one or more methods, all different; got []"),
        (("--seeds", ""), "expected one or more training seeds, all different; got []"),
        (("--seeds", "1,1"), "expected one or more training seeds, all different; got [1, 1]"),
        (("--seeds", "one"), "--seeds: 'one' is no list of numbers with commas"),
        (("--seeds", "-1"), "expected seeds of 0 or more; got [-1]"),
        (("--lambdas", "4,4.0"), "expected one or more λs, all different; got [4.0, 4.0]"),
        (("--lambdas=-4",), "expected λs of 0 or more; got [-4.0]"),
        (("--lambdas", "nan"), "expected λs of 0 or more; got [nan]"),
        (("--protocol", "loose"), "Training setting protocol"),
        (("--preset", "huge"), "Preset 'huge' is unknown; there are small, paper"),
        (("--recipe", "slow"), "Recipe 'slow' is unknown; there are fast, published"),
        (("--epochs", "0"), "Training setting epochs"),
        (("--device", "tpu"), "Training setting device"),
        (("--config", "no.toml"), "no.toml cannot be read"),
        (("--data", "absent"), "absent is not a data set folder"),
        (("--out", "tiny.toml"), "tiny.toml is no folder that can be written to: Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_nonsense_is_one_line(
    bench: Bench,
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(bench.folder)
    start = ["backcast", "benchmark", "--data", "shop", "--out", "new", "--processes", "1"]
    monkeypatch.setattr("sys.argv", [*start, "--config", "tiny.toml", "--epochs", "2", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    output, log = capsys.readouterr()
    assert (ended.value.code, output) == (1, "")
    (error,) = [row for row in log.splitlines() if not row.startswith("benchmark ")]
    assert error.startswith("error: ")
    assert message in error
    assert not (bench.folder / "new").exists()


def test_methods_are_listed_for_people_and_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--json"]):
        app(["methods", *arguments], standalone_mode=False)
    output = capsys.readouterr().out
    shown, _, document = output.partition("[\n")
    listed = {found["name"]: found for found in json.loads("[" + document)}
    assert listed["keep-all"]["trainable"] is False
    assert listed["bc-aligner"]["lambda"] == 16.0
    assert listed["bc-aligner"]["title"] == "BC-Aligner"
    assert re.search(r"│ bc-aligner\s+│ yes\s+│\s+16.0 │ Joint training of model and", shown)
    assert re.search(r"│ keep-all\s+│\s+│\s+-? │ Every model and all its vectors", shown)


# --- workers in this process's stead --------------------------------------------------------------


def test_an_error_in_a_worker_is_the_error(tmp_path: Path) -> None:
    dataset: Dataset = synthetic(tmp_path / "data")
    plan = tiny_plan(
        dataset.folder, tmp_path, "non-bc", consumed=(0,), training={"learning_rate": 1e30}
    )
    with threads(1), pytest.raises(InvalidInput, match="Training diverged in epoch"):
        run(plan, processes=2, told=quiet)
