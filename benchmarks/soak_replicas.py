"""Replicas that are killed, stalled and started again: real ``backcast serve`` processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event

import httpx2

from backcast.settings import Settings
from benchmarks.serving_load import Unmeasured
from benchmarks.serving_processes import environment, free_port

START_S, STOP_S = 90, 20
_ANSWER_S = 15


class Replica:
    """One ``backcast serve`` with one worker, always on the same port."""

    def __init__(self, number: int, environ: Mapping[str, str], folder: Path) -> None:
        self.name = f"replica {number}"
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = folder / f"replica-{number}.log"
        self._environ = environ
        self._http = httpx2.Client(base_url=self.url, timeout=_ANSWER_S)
        self._command = [sys.executable, "-m", "backcast", "serve", "--port", str(port)]
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, without waiting for it."""
        with self.log.open("ab") as output:
            self._running = subprocess.Popen(
                self._command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us, who then stop it
            )

    def wait(self, stopping: Event) -> None:
        """Wait until it is ready; started again where it ended, as a supervisor would.

        Raises:
            Unmeasured: it was not ready in time.
        """
        deadline = time.monotonic() + START_S
        while not stopping.is_set() and self.serves() is None:
            if time.monotonic() > deadline:
                last = "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
                raise Unmeasured(f"{self.name} is not ready:\n{last}")
            if self._running is None or self._running.poll() is not None:
                self.start()
            time.sleep(0.05)

    def serves(self) -> str | None:
        """Return the S.d that it says it serves, None where it does not."""
        try:
            answer = self._http.get("/readyz")
        except httpx2.TransportError:
            return None
        return str(answer.json()["snapshot"]) if answer.status_code == 200 else None

    def starved(self) -> dict[str, float]:
        """Return the seconds that each of its threads could run and had no core, as Linux says."""
        if self._running is None:
            return {}
        threads = Path(f"/proc/{self._running.pid}/task")
        found: dict[str, float] = {}
        with suppress(OSError):  # it has ended
            for thread in os.listdir(threads):
                with suppress(OSError):  # that thread has
                    said = (threads / thread / "schedstat").read_text()
                    found[thread] = int(said.split()[1]) / 1e9  # it ran, waited, how often
        return found

    def kill(self) -> None:
        """Kill it outright."""
        self.signal(signal.SIGKILL)
        if self._running is not None:
            self._running.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, number)

    def stop(self) -> None:
        """End it in good order, or else outright."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            if self._running is not None:
                self._running.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._http.close()


def replica_environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a replica."""
    return environment(
        settings,
        1,
        BACKCAST_DATABASE_URL=settings.database_url,
        BACKCAST_ARTIFACTS_URL=settings.artifacts_url,
        BACKCAST_STORE_URL=settings.store_url,
        BACKCAST_READS=settings.reads,
        BACKCAST_GRACE_SECONDS=str(settings.grace_seconds),
        BACKCAST_POLL_SECONDS=str(settings.poll_seconds),
        BACKCAST_OPERATION_TIMEOUT=str(settings.operation_timeout),
        BACKCAST_GATE_COVERAGE=str(settings.gate_coverage),
        BACKCAST_GATE_CHANGE=str(settings.gate_change),
    )
