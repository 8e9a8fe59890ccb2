"""Write docs/licences.md: what every locked package says of its licence.

Usage: python -m tests.licences > docs/licences.md
"""

import json
import re
import subprocess
import sys
from collections import defaultdict

from tests.e2e.documents import ROOT

REQUIREMENTS = ROOT / "requirements"
LOCK_FILES = ("core", "service", "train", "otel", "fuzz", "dev", "build", "torch")
ELSEWHERE = {
    "async-timeout": "Apache-2.0",
    "atheris": "Apache-2.0",
    "colorama": "BSD-3-Clause",
    "httpx2-jsfetch": "BSD-3-Clause",
}
"""Read by hand: other systems and other versions of Python install these, or fuzzing does."""

_PIN = re.compile(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", re.MULTILINE)
_HEAD = """\
# Licences

Every package that a lock file of `requirements/` names, and its licence in the package's own
words. `make licences` writes this page; a test compares it with the lock files.
[Dependencies](dependencies.md) says what each direct one is for, and where the licences that ask
for more than a notice apply.

| package | versions | licence | in the lock files |
|---|---|---|---|"""


def locked() -> dict[str, tuple[set[str], list[str]]]:
    """Return the versions of every locked package, and the lock files that name it."""
    found: dict[str, tuple[set[str], list[str]]] = defaultdict(lambda: (set(), []))
    for lock_file in LOCK_FILES:
        for name, version in _PIN.findall((REQUIREMENTS / f"{lock_file}.txt").read_text()):
            versions, lock_files = found[canonical(name)]
            versions.add(version)
            if lock_file not in lock_files:
                lock_files.append(lock_file)
    return found


def canonical(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed() -> dict[str, str]:
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--with-system"]
    packages = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {canonical(package["Name"]): package["License"] for package in packages}


def main() -> None:
    """Print the page."""
    licences = ELSEWHERE | _installed()
    lines = [_HEAD]
    for name, (versions, lock_files) in sorted(locked().items()):
        cells = (f"`{name}`", ", ".join(sorted(versions)), licences[name], ", ".join(lock_files))
        lines.append(f"| {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
