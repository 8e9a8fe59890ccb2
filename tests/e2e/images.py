"""A Dockerfile carried out by hand: its steps as they are written, below a folder instead of /.

What it cannot show is the base image: Python is the one that runs the tests, and system packages
are this machine's. It knows the instructions that the Dockerfile uses, and no others.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.e2e.documents import ROOT

TOOLS = str(Path(sys.executable).parent)
SECONDS = 400
_OF_THE_IMAGE = re.compile(r"(?<![\w}/])/(?=(?:app|build|opt|run|tmp|var)\b)")
_CAPABILITIES = "-all,+dac_read_search"
"""Reads what only root may, since Python may lie there; writes nothing more than its user may."""


class Unknown(Exception):
    """The Dockerfile does something that is not done by hand here yet."""


@dataclass(frozen=True)
class Image:
    """What a stage leaves behind.

    Attributes:
        root: the folder that stands for /; every path lies below it.
    """

    root: Path
    environ: Mapping[str, str]
    workdir: Path
    labels: Mapping[str, str] = field(default_factory=dict)
    user: str = "0:0"
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    health: Sequence[str] = ()
    stop_signal: str = ""

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], **options: object
    ) -> subprocess.Popen[str]:
        """Start a command as a container would: its user, no rights, nothing of our environment."""
        path = self.environ["PATH"].replace(f"{TOOLS}:", "")
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [*_as_user(self.user), "env", *command],  # env: it looks along the image's PATH
            cwd=self.workdir,
            env={**self.environ, "PATH": path, **environ},
            text=True,
            stdin=subprocess.DEVNULL,
            **options,
        )

    def run(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(command, environ or {}, **pipes) as process:
            stdout, stderr = process.communicate(timeout=SECONDS)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def located(text: str, root: Path) -> str:
    """Return ``text`` with the paths of an image below ``root``."""
    return _OF_THE_IMAGE.sub(f"{root}/", text)


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the rest of every instruction."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


def _stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Return the base of every stage and its instructions, by name, the default one last."""
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    steps: list[tuple[str, str]] = []
    for name, rest in instructions(ROOT / "Dockerfile"):
        if name == "FROM":
            base, _, stage = rest.split()
            stages[stage] = (base, steps := [])
        else:
            steps.append((name, rest))
    return stages


class Builder:
    """Carries out stages below a folder, one at a time, for each becomes its /.

    Args:
        arguments: the values of ARGs, as of ``docker build --build-arg``.
    """

    def __init__(self, folder: Path, **arguments: str) -> None:
        self._folder, self._arguments = folder, arguments
        self._root = folder / "root"  # of whichever stage it is: paths in scripts stay true
        self._stages = _stages()
        self._built: dict[str, Image] = {}  # the last one is at the root, the others are kept

    def build(self, stage: str) -> Image:
        """Return the image of a stage; those built before cannot be run any more."""
        base, steps = self._stages[stage]
        for needed in {base, *_sources(steps)} & self._stages.keys():
            if needed not in self._built:
                self.build(needed)
        if self._built:
            self._root.rename(self._kept(list(self._built)[-1]))
        image = self._begin(base)
        for name, rest in steps:
            image = self._step(image, name, located(_possible_user(rest), self._root))
        self._built[stage] = image
        return image

    def _kept(self, stage: str) -> Path:
        return self._folder / f"stage-{stage}"

    def _begin(self, base: str) -> Image:
        if base in self._stages:
            _copy(self._kept(base), self._root)
            return self._built[base]
        (self._root / "tmp").mkdir(parents=True)
        return Image(self._root, {"PATH": f"{TOOLS}:{os.defpath}"}, self._root)

    def _step(self, image: Image, name: str, rest: str) -> Image:
        match name:
            case "ARG":
                variable, _, default = rest.partition("=")
                value = self._arguments.get(variable, default)
                return replace(image, environ={**image.environ, variable: value})
            case "ENV":
                return replace(image, environ={**image.environ, **_pairs(rest, image.environ)})
            case "LABEL":
                return replace(image, labels={**image.labels, **_pairs(rest, {})})
            case "WORKDIR":
                Path(rest).mkdir(parents=True, exist_ok=True)
                return replace(image, workdir=Path(rest))
            case "COPY":
                self._copy(image, rest)
            case "RUN":
                self._run(image, rest)
            case "USER":
                return replace(image, user=rest)
            case "ENTRYPOINT":
                return replace(image, entrypoint=json.loads(rest))
            case "CMD":
                return replace(image, command=json.loads(rest))
            case "HEALTHCHECK":
                return replace(image, health=json.loads(rest[rest.index("CMD ") + 4 :]))
            case "STOPSIGNAL":
                return replace(image, stop_signal=rest)
            case "EXPOSE":
                pass
            case _:
                raise Unknown(f"{name} {rest}")
        return image

    def _copy(self, image: Image, rest: str) -> None:
        *sources, target = rest.split()
        if sources[0].startswith("--from="):
            kept = self._kept(sources.pop(0).removeprefix("--from="))
            (source,) = sources
            _copy(kept / Path(source).relative_to(self._root), Path(target))
            return
        for source in sources:
            if source.endswith("/"):
                hidden = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, image.workdir / target, ignore=hidden)
            else:
                shutil.copy(ROOT / source, image.workdir / target)

    def _run(self, image: Image, rest: str) -> None:
        variables = {
            k: v for k, v in os.environ.items() if not k.startswith(("BACKCAST", "PYTHON"))
        }
        done = subprocess.run(
            ["sh", "-ec", rest],
            cwd=image.workdir,
            env={**variables, **image.environ},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"RUN {rest}\n{done.stdout}\n{done.stderr}"


def _sources(steps: Sequence[tuple[str, str]]) -> set[str]:
    return {s for name, rest in steps if name == "COPY" for s in re.findall(r"--from=(\S+)", rest)}


def _pairs(text: str, environ: Mapping[str, str]) -> dict[str, str]:
    known = re.sub(r"\$(\w+)", lambda found: environ[found[1]], text)
    return dict(pair.split("=", 1) for pair in shlex.split(known))


def _copy(source: Path, target: Path) -> None:
    """Copy a tree; its files are linked, for nothing changes them in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", "--link", source, target], check=True)


def _possible_user(text: str) -> str:
    """Return ``text`` with the image's user replaced by our own, where we cannot become it."""
    if os.geteuid() == 0:
        return text
    return text.replace("10001:10001", f"{os.geteuid()}:{os.getegid()}")


def _as_user(user: str) -> list[str]:
    if os.geteuid() != 0:
        return []
    uid, gid = user.split(":")
    return [
        *("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"),
        f"--inh-caps={_CAPABILITIES}",
        f"--ambient-caps={_CAPABILITIES}",
        f"--bounding-set={_CAPABILITIES}",
    ]
