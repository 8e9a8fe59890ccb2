"""A body or a file is read, or refused with an error that says why; nothing worse comes of it."""

import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import bodies, files
from tests.fuzz.campaign import Outcome, attack
from tests.fuzz.target import Target, plain
from tests.fuzz.targets import TARGETS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)
FIELDS = st.sampled_from(
    ["ids", "vectors", "version", "entity", "drift", "expected_live", "reason", "sunset_at"]
)


def check(outcome: Outcome, cases: int) -> None:
    assert outcome.failures == {}
    assert outcome.tried == cases
    assert outcome.accepted > 0


@pytest.mark.parametrize("name", [target.name for target in bodies.TARGETS])
def test_mutated_bodies(name: str) -> None:
    check(attack(TARGETS[name], cases=3_000), 3_000)


@pytest.mark.parametrize("name", [target.name for target in files.TARGETS])
def test_mutated_files(name: str) -> None:
    target = TARGETS[name]
    cases = len(target.seeds()) + 150
    check(attack(target, cases=cases), cases)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_for_long(name: str) -> None:
    outcome = attack(TARGETS[name], cases=10**9, seed=1, seconds=60)
    check(outcome, outcome.tried)


@pytest.mark.parametrize("name", ["JSON batch", "JSON upsert", "JSON orders"])
@given(document=st.dictionaries(FIELDS | st.text(), JSON) | JSON)
def test_any_json(name: str, document: Any) -> None:
    content = json.dumps(document).encode()  # as Python writes it: NaN, and any number of digits
    TARGETS[name].reader(Path())(content)


@pytest.mark.parametrize("name", [target.name for target in bodies.TARGETS])
@given(content=st.binary(max_size=300))
def test_any_bytes(name: str, content: bytes) -> None:
    TARGETS[name].reader(Path())(content)


UNPICKLING: dict[str, Callable[[bytes], object]] = {
    "pickle": pickle.loads,
    "torch": lambda content: torch.load(io.BytesIO(content), weights_only=False),
    "NumPy": lambda content: np.load(io.BytesIO(content), allow_pickle=True)["weight"],
}


@pytest.mark.parametrize("kind", UNPICKLING)
def test_who_unpickles_is_noticed(kind: str) -> None:
    seeds = [files.pickles()[list(UNPICKLING).index(kind)]]
    outcome = attack(Target("unpickles", lambda: seeds, plain(UNPICKLING[kind])), cases=1)
    [failure] = outcome.failures.values()
    assert "signal 6" in failure


def _die(content: bytes) -> None:
    if content == b"kill":
        os.abort()
    if content == b"grow":
        bytearray(300 << 20)
    if content == b"fail":
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"kill", "signal 6"), (b"grow", "of memory"), (b"fail", "ZeroDivisionError")],
)
def test_the_campaign_sees_it_and_goes_on(content: bytes, told: str) -> None:
    seeds: Sequence[bytes] = [b"fine", content, b"fine"]
    outcome = attack(Target("dies", lambda: seeds, plain(_die)), cases=3)
    assert (outcome.tried, outcome.accepted) == (3, 2)
    [failure] = outcome.failures.values()
    assert told in failure
    assert "case 1 of seed 0" in failure
