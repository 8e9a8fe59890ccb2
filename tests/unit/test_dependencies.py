"""Every dependency has a lock, a reason and a licence that is allowed."""

import re
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement

from tests.e2e.documents import ROOT
from tests.licences import LOCK_FILES, canonical, locked

PERMISSIVE = {
    *("0BSD", "3-Clause BSD License", "BSD License", "BSD-2-Clause", "BSD-3-Clause"),
    *("Apache Software License", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"),
    *("MIT", "MIT License", "MIT-CMU", "ISC License (ISCL)", "BSL-1.0", "CC0-1.0", "Zlib"),
    *("PSF-2.0", "Python Software Foundation License"),
}
_PINNED = re.compile(r"^(?P<line>[\w.-]+.*?==[^\\\n]+)(?P<hashes>(?:\\\n +--hash=\S+ ?)*)$", re.M)


def test_every_extra_is_known_here() -> None:
    assert set(_direct()) == set(LOCK_FILES) - {"build", "torch"}


@pytest.mark.parametrize("extra", ["core", "service", "train", "otel", "fuzz", "dev"])
def test_lock_file_satisfies_every_direct_dependency(extra: str) -> None:
    pins = {**_pins(extra), **_pins("torch")}
    core = [] if extra == "core" else _direct()["core"]
    for wanted in (*_direct()[extra], *core):
        assert canonical(wanted.name) in pins, wanted
        for pin in pins[canonical(wanted.name)]:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert wanted.specifier.contains(version, prereleases=True), f"{wanted}, not {pin}"


@pytest.mark.parametrize("lock_file", sorted(set(LOCK_FILES) - {"torch"}))
def test_every_package_of_a_lock_file_is_hashed(lock_file: str) -> None:
    text = (ROOT / f"requirements/{lock_file}.txt").read_text()
    names = re.findall(r"^[\w.-]+", text, re.MULTILINE)
    hashed = [found["line"] for found in _PINNED.finditer(text) if "sha256:" in found["hashes"]]
    assert len(hashed) == len(names) > 0


def test_only_torch_is_pinned_without_a_hash() -> None:
    assert [str(pin) for pins in _pins("torch").values() for pin in pins] == ["torch==2.13.0"]


def test_any_two_lock_files_can_be_installed_together() -> None:
    files = [_pins(lock_file) for lock_file in LOCK_FILES]
    for name in locked():
        pinned = {frozenset(str(pin.specifier) for pin in of[name]) for of in files if name in of}
        assert len(pinned) == 1, (name, pinned)


def test_every_direct_dependency_has_a_reason_and_no_other_is_listed() -> None:
    documented = [[row[0] for row in rows] for rows in _tables("docs/dependencies.md")]
    declared = [sorted({canonical(r.name) for r in of}) for of in _direct().values()]
    assert [sorted(names) for names in documented[:-1]] == declared
    assert all(row[1] for rows in _tables("docs/dependencies.md") for row in rows)


def test_every_locked_package_is_in_the_list_of_licences() -> None:
    (rows,) = _tables("docs/licences.md")
    listed = [(name, versions, files) for name, versions, _, files in rows]
    assert listed == [
        (name, ", ".join(sorted(versions)), ", ".join(files))
        for name, (versions, files) in sorted(locked().items())
    ]


def test_licences_are_permissive_or_named_with_where_they_apply() -> None:
    licences = _licences()
    asking = {name: text for name, text in licences.items() if not _parts(text) <= PERMISSIVE}
    named = {row[0]: row[1] for row in _tables("docs/dependencies.md")[-1]}
    assert named == asking


def test_dependencies_say_the_licences_of_the_list() -> None:
    licences = _licences()
    for rows in _tables("docs/dependencies.md")[:-1]:
        assert {row[0]: row[2] for row in rows} == {row[0]: licences[row[0]] for row in rows}


def _direct() -> dict[str, list[Requirement]]:
    """Return what pyproject.toml asks for, by extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: [r for r in map(Requirement, lines) if r.name != project["name"]]
        for extra, lines in lists.items()
    }


def _pins(lock_file: str) -> dict[str, list[Requirement]]:
    pins: dict[str, list[Requirement]] = {}
    for found in _PINNED.finditer((ROOT / f"requirements/{lock_file}.txt").read_text()):
        pin = Requirement(found["line"])
        pins.setdefault(canonical(pin.name), []).append(pin)
    return pins


def _tables(document: str) -> list[list[list[str]]]:
    """Return the rows of every table whose first cells are code spans."""
    return [list(_rows(table)) for table in (ROOT / document).read_text().split("|---|\n")[1:]]


def _rows(table: str) -> Iterator[list[str]]:
    for line in table.splitlines():
        if not line.startswith("| `"):
            return
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        yield [name.strip("`"), *cells]


def _licences() -> dict[str, str]:
    return {name: licence for name, _, licence, _ in _tables("docs/licences.md")[0]}


def _parts(licence: str) -> set[str]:
    return set(
        re.split(r" AND | OR |; ", licence.replace("(Apache", "Apache").replace("MIT)", "MIT"))
    )
