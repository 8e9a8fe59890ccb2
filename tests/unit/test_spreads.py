"""Percentiles from a histogram are those of the numbers, to half a percent."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from backcast.spreads import Tally

RNG = np.random.default_rng(5)
SAMPLES = {
    "normal": np.abs(RNG.standard_normal(5_000)),
    "log-uniform": np.exp(RNG.uniform(-30, 30, 5_000)),
    "mostly zero": np.where(RNG.random(5_000) < 0.97, 0, RNG.random(5_000)),
    "one": np.array([0.37]),
    "equal": np.full(100, 2.5),
    "tiny and huge": np.array([1e-30, 1e-19, 1e19, 3e19]),
}


def tally(numbers: NDArray[np.float64], pieces: int = 1) -> Tally:
    made = Tally()
    for piece in np.array_split(numbers, pieces):
        made.add(piece)
    return made


@pytest.mark.parametrize("numbers", SAMPLES.values(), ids=SAMPLES)
def test_spread_is_that_of_the_numbers(numbers: NDArray[np.float64]) -> None:
    spread = tally(numbers).spread()
    assert spread is not None
    for percent, found in ((50, spread.p50), (95, spread.p95), (99, spread.p99)):
        exact = np.quantile(numbers, percent / 100, method="inverted_cdf")
        assert found == pytest.approx(exact, rel=0.006, abs=1e-20)
    assert spread.mean == pytest.approx(numbers.mean(), rel=1e-12)
    assert spread.max == numbers.max()


def test_pieces_count_as_the_whole_and_empty_ones_not_at_all() -> None:
    numbers = SAMPLES["normal"]
    whole, parts = tally(numbers).spread(), tally(numbers, 700).spread()
    assert whole is not None
    assert parts is not None
    assert parts.mean == pytest.approx(whole.mean)
    assert (parts.p50, parts.p95, parts.p99, parts.max) == (
        whole.p50,
        whole.p95,
        whole.p99,
        whole.max,
    )
    assert tally(np.empty(0)).spread() is None


def test_percentile_never_exceeds_the_largest() -> None:
    for number in np.exp(np.linspace(-1, 1, 200)):
        spread = tally(np.array([number])).spread()
        assert spread is not None
        assert spread.p50 <= spread.max == number


def test_memory_does_not_grow_with_the_numbers() -> None:
    made, piece = Tally(), np.abs(RNG.standard_normal(1_000))
    made.add(piece)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(200):
        made.add(piece)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.count == 201_000
    assert after - before < 20_000
