"""Load from wrk: what it sends, and what it measured. Loopback only."""

import json
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
RAW = "application/octet-stream"

_RESULT = "result "
_SCRIPT = """\
local requests, at = {}, 0

function init(arguments)
  for line in io.lines(%(file)s) do
    local path, body = line:match("^([^\\t]*)\\t(.*)$")
    requests[#requests + 1] = wrk.format(%(method)s, path, nil, body ~= "" and body or nil)
  end
end

function request()
  at = at %% #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  local sockets = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '\\n%(result)s{"requests":%%d,"seconds":%%f,"p50_ms":%%f,"p99_ms":%%f,"non_2xx":%%d,"errors":%%d}\\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, errors.status, sockets))
end
"""


class Unmeasured(Exception):
    """A figure that could not be taken, and why."""


@dataclass(frozen=True)
class Requests:
    """What a client sends, one request after another, beginning anew at the end.

    Attributes:
        pairs: path and body of each request.
        vectors: the number of vectors that each asks for.
    """

    method: str
    pairs: Sequence[tuple[str, str]]
    vectors: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)

    def to(self, path: str) -> "Requests":
        """Return the same bodies, sent to another path."""
        return replace(self, pairs=[(path, body) for _, body in self.pairs])

    def script(self, folder: Path) -> Path:
        """Write the requests and wrk's script into a folder."""
        lines = folder / "requests.txt"
        lines.write_text("".join(f"{path}\t{body}\n" for path, body in self.pairs))
        literals = {"file": str(lines), "method": self.method}
        text = _SCRIPT % {
            "result": _RESULT,
            **{name: json.dumps(value) for name, value in literals.items()},
        }
        headers = "".join(
            f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}\n"
            for name, value in self.headers.items()
        )
        script = folder / "script.lua"
        script.write_text(headers + text)
        return script


def singles(ids: Sequence[str], media: str, secret: str | None = None) -> Requests:
    """Return GETs of one ver-0 vector each."""
    keyed = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    pairs = [(f"/embeddings/{id}?version=0", "") for id in ids]
    return Requests("GET", pairs, headers={"Accept": media, **keyed})


def batches(ids: Sequence[str], size: int, media: str) -> Requests:
    """Return POSTs that ask for ver-0 vectors of ``size`` ids each."""
    bodies = [orjson.dumps({"ids": piece, "version": 0}) for piece in pieces(ids, size)]
    return posts("/embeddings/batch", bodies, size, media)


def pieces(ids: Sequence[str], size: int) -> list[Sequence[str]]:
    """Return all whole runs of ``size`` ids."""
    return [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]


def posts(path: str, bodies: Sequence[bytes], vectors: int, media: str = JSON) -> Requests:
    """Return POSTs of JSON bodies, each asking for ``vectors`` vectors."""
    pairs = [(path, body.decode()) for body in bodies]
    return Requests("POST", pairs, vectors, {"Accept": media, "Content-Type": JSON})


@dataclass(frozen=True)
class Load:
    """What wrk measured.

    Attributes:
        vectors: asked for by each request.
        cpu: seconds of CPU that wrk took itself.
        server_cpu: seconds of CPU that the server took meanwhile.
    """

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    non_2xx: int
    errors: int
    vectors: int
    cpu: float
    server_cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def vector_rate(self) -> float:
        """Vectors per second."""
        return self.vectors * self.rate

    @property
    def server_us(self) -> float:
        """Microseconds of the server's CPU for each request."""
        return 1e6 * self.server_cpu / self.requests

    @property
    def wrk_us(self) -> float:
        """Microseconds of wrk's CPU for each request."""
        return 1e6 * self.cpu / self.requests

    def __str__(self) -> str:
        return (
            f"{self.rate:,.0f} requests/s, {self.vector_rate:,.0f} vectors/s, "
            f"p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms, "
            f"{self.server_us:,.0f} µs of the server's CPU a request"
        )


def find_wrk(path: str | None = None) -> str:
    """Return wrk's program on ``path``, by default that of the environment."""
    found = shutil.which("wrk", path=path)
    if found is None:
        raise Unmeasured("There is no wrk here, which makes the load: apt-get install wrk")
    return found


def drive(url: str, requests: Requests, *, connections: int, seconds: float) -> Load:
    """Send requests for some seconds over connections that each wait for their answers.

    Raises:
        Unmeasured: wrk failed, or an answer was missing or not a 2xx.
    """
    with TemporaryDirectory(prefix="backcast-wrk-") as folder:
        script = requests.script(Path(folder))
        command = [find_wrk(), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        command += ["--timeout", "60s", "-s", str(script), url]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        raise Unmeasured(f"wrk ended with {ended.returncode}: {ended.stderr or ended.stdout}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return read_load(ended.stdout, requests.vectors, cpu)


def read_load(output: str, vectors: int, cpu: float) -> Load:
    """Read what wrk's script printed; raise Unmeasured where not every answer was right."""
    found = [line for line in output.splitlines() if line.startswith(_RESULT)]
    if not found:
        raise Unmeasured(f"wrk printed no result: {output}")
    load = Load(**orjson.loads(found[0].removeprefix(_RESULT)), vectors=vectors, cpu=cpu)
    if load.non_2xx or load.errors or not load.requests:
        raise Unmeasured(
            f"not every answer was right: {load.requests} answers, "
            f"{load.non_2xx} non-2xx, {load.errors} socket errors"
        )
    return load
