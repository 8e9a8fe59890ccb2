"""Each precision rounds to the nearest number it can hold, ties to even, and loses no more."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from backcast.stores.precision import Precision, Rounder, Rounding
from backcast.vectors import VectorBatch
from backcast.versions import Entity

TORCH = {
    Precision.FLOAT32: torch.float32,
    Precision.FLOAT16: torch.float16,
    Precision.BFLOAT16: torch.bfloat16,
}


def check(numbers: NDArray[np.float32], precision: Precision) -> None:
    """Compare bit by bit with what PyTorch rounds to."""
    stored = precision.narrow(numbers)
    rounded = torch.from_numpy(numbers).to(TORCH[precision])
    assert stored.dtype == precision.dtype
    assert stored.tobytes() == rounded.view(torch.uint8).numpy().tobytes()
    finite = torch.isfinite(rounded).numpy()
    assert precision.widen(stored)[finite].tobytes() == rounded.float().numpy()[finite].tobytes()


@pytest.mark.parametrize("precision", Precision)
def test_every_upper_half_of_a_number_rounds_as_it_should(precision: Precision) -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    numbers = (upper[:, None] | ends.astype(np.uint32)).view(np.float32)
    check(numbers[np.isfinite(numbers).all(axis=1)], precision)


@pytest.mark.parametrize("precision", Precision)
@given(numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_any_number_rounds_as_it_should(precision: Precision, numbers: list[float]) -> None:
    check(np.array(numbers, np.float32), precision)


def test_cost_is_that_of_all_batches_together() -> None:
    rounder = Rounder(Precision.BFLOAT16)
    for ids, rows in (("a", [[257, 0]]), ("bcd", [[1, 0], [0, 0], [0, 514]]), ("", [])):
        vectors = np.array(rows, np.float32).reshape(-1, 2)
        rounder(VectorBatch(Entity.ITEM, list(ids), vectors))
    total = rounder.total  # 257 and 514 lie half-way between two numbers of eight bits
    assert total == Rounding(Precision.BFLOAT16, (1 / 257 + 2 / 514) / 4, 1 / 257)
    assert str(total) == "bfloat16, relative error 1.9e-03 on average, 3.9e-03 at most"


def test_very_large_and_very_small_numbers_are_measured_too() -> None:
    rounder = Rounder(Precision.BFLOAT16)
    vectors = np.array([[2e38, 2e38], [1e-30, 2e-30]], np.float32)
    rounder(VectorBatch(Entity.ITEM, ["large", "small"], vectors))
    assert 0 < rounder.total.mean_error <= rounder.total.largest_error < 2**-8


def test_float32_loses_nothing() -> None:
    rounder, vectors = Rounder(Precision.FLOAT32), np.ones((1, 2), np.float32)
    assert rounder(VectorBatch(Entity.USER, ["u"], vectors)).tobytes() == vectors.tobytes()
    assert rounder.total == Rounding()
    assert str(rounder.total) == "float32, nothing lost"
