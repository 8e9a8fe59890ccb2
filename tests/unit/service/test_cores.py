"""Workers share the cores, unless somebody says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cores import count_cores, share_cores
from tests.servers import free_port

CORES = count_cores()


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", CORES),
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        (f"{100_000 * (CORES + 1)} 100000\n", CORES),
        ("", CORES),
    ],
)
def test_container_may_have_less_than_the_machine(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert count_cores(tmp_path / "cpu.max") == cores


def test_without_a_container_all_are_counted(tmp_path: Path) -> None:
    assert count_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("workers", [1, CORES, CORES + 1])
def test_share_is_one_thread_at_least(workers: int) -> None:
    environ: dict[str, str] = {}
    share_cores(workers, environ)
    assert environ == {"OMP_NUM_THREADS": str(max(1, CORES // workers))}


def test_what_the_user_says_stands() -> None:
    environ = {"OMP_NUM_THREADS": "7"}
    share_cores(2, environ)
    assert environ == {"OMP_NUM_THREADS": "7"}


@pytest.mark.parametrize(
    ("workers", "said", "threads"), [(1, None, CORES), (CORES, None, 1), (1, "1", 1)]
)
def test_torch_and_its_workers_hear_of_it(
    tmp_path: Path, workers: int, said: str | None, threads: int
) -> None:
    program = (
        "import os, subprocess, sys, service.supervisor\n"
        "count = 'import torch; print(torch.get_num_threads(), flush=True)'\n"
        "def run(*_, **__):\n"
        "    exec(count)\n"
        "    subprocess.run([sys.executable, '-c', count], check=True)\n"
        "service.supervisor.run = run\n"
        "from backcast.cli import main; main()"
    )
    environ = {**os.environ, "BACKCAST_HOME": str(tmp_path), "OMP_NUM_THREADS": said or ""}
    if said is None:
        del environ["OMP_NUM_THREADS"]
    serve = ["serve", "--port", str(free_port()), "--workers", str(workers)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *serve], env=environ, capture_output=True, text=True
    )
    assert ended.stdout.split() == [str(threads)] * 2, ended.stderr
