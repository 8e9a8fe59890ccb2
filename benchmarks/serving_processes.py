"""Server processes on free loopback ports: started, waited for, looked at, stopped."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2

from backcast.settings import Settings
from benchmarks.serving_load import Unmeasured

ROOT = Path(__file__).parents[1]
START_S, STOP_S = 120, 20
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Memory:
    """Memory of some processes, in MiB.

    Attributes:
        rss: resident, pages of mapped files included, which the kernel can take back.
        pss: the same, shared pages divided by the number of those who share them.
        own: of no file.
    """

    rss: float
    pss: float
    own: float

    def __str__(self) -> str:
        return f"{self.rss:,.0f} / {self.pss:,.0f} / {self.own:,.0f}"


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        started: seconds until it was ready.
    """

    url: str
    pid: int
    started: float

    def pids(self) -> list[int]:
        """Return the server's processes: the first one and all below it."""
        return [self.pid, *_below(self.pid)]

    def cpu(self) -> float:
        """Return the seconds of CPU that all its processes have taken so far."""
        return sum(_cpu(pid) for pid in self.pids())

    def memory(self) -> Memory:
        """Return what its processes hold now."""
        kinds = zip(*(_memory(pid) for pid in self.pids()), strict=True)
        return Memory(*(sum(kind) / 1024 for kind in kinds))


def environment(settings: Settings, threads: int, **more: str) -> dict[str, str]:
    """Return the environment of a server of a deployment, thread counts fixed."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("BACKCAST_")}
    paths = [str(ROOT), *filter(None, [others.get("PYTHONPATH")])]
    return {
        **others,
        **dict.fromkeys(THREADS, str(threads)),
        "PYTHONPATH": os.pathsep.join(paths),
        "BACKCAST_HOME": str(settings.home),
        "BACKCAST_READS": "open",
        "BACKCAST_DEVICE": "cpu",
        **more,
    }


@contextmanager
def backcast_server(environ: Mapping[str, str], *, workers: int = 1) -> Iterator[Server]:
    """Run ``backcast serve``."""
    port = free_port()
    command = [sys.executable, "-m", "backcast", "serve", "--port", str(port)]
    with http_server([*command, "--workers", str(workers)], environ, port, "/readyz") as server:
        yield server


@contextmanager
def http_server(
    command: Sequence[str], environ: Mapping[str, str], port: int, ready: str
) -> Iterator[Server]:
    """Run a server, which is ready when the path ``ready`` answers with 200."""
    url = f"http://127.0.0.1:{port}"
    with process(command, environ, lambda: _answers(url + ready)) as (pid, started):
        yield Server(url, pid, started)


@contextmanager
def redis_server() -> Iterator[str]:
    """Run a Redis of our own that keeps what it is given, and yield its URL."""
    from redis import Redis, RedisError

    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"

    def answers() -> bool:
        try:
            with Redis.from_url(url) as client:
                return bool(client.ping())
        except RedisError:
            return False

    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port)]
    command += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
    with process(command, os.environ, answers):
        yield url


@contextmanager
def process(
    command: Sequence[str], environ: Mapping[str, str], ready: Callable[[], bool]
) -> Iterator[tuple[int, float]]:
    """Run a command until the block ends; yield its pid and the seconds until it was ready.

    Raises:
        Unmeasured: it is not installed, it ended, or it was not ready in time.
    """
    with TemporaryDirectory(prefix="backcast-bench-") as folder:
        log = Path(folder) / "log"
        try:
            with log.open("wb") as output:
                running = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us, who then stop it
                )
        except FileNotFoundError as error:
            raise Unmeasured(f"{command[0]} is not installed here.") from error
        try:
            yield running.pid, _wait(running, ready, log)
        finally:
            _stop(running)


def _wait(running: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> float:
    started = time.monotonic()
    while not ready():
        if running.poll() is not None or time.monotonic() - started > START_S:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise Unmeasured(f"{running.args!r} is not ready:\n{last}")
        time.sleep(0.02)
    return time.monotonic() - started


def _stop(running: subprocess.Popen[bytes]) -> None:
    running.terminate()
    try:
        running.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def free_port() -> int:
    """Return a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def _below(pid: int) -> list[int]:
    children = _read(pid, f"task/{pid}/children").split()
    return [found for child in map(int, children) for found in (child, *_below(child))]


def _cpu(pid: int) -> float:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> list[int]:
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(pid, "smaps_rollup"), re.MULTILINE))
    return [int(found[name]) for name in ("Rss", "Pss", "Anonymous")]


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
