"""A batch that can be made can be stored."""

import numpy as np
import pytest

from backcast.errors import DimensionMismatch, InvalidInput
from backcast.vectors import MAX_ID_BYTES, VectorBatch, check_id
from backcast.versions import Entity


def batch(*rows: list[float], ids: list[str] | None = None) -> VectorBatch:
    named = [f"i{n}" for n in range(len(rows))] if ids is None else ids
    return VectorBatch(Entity.ITEM, named, np.array(rows, np.float32))


def test_vectors_become_contiguous_float32() -> None:
    columns = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3))
    made = VectorBatch(Entity.USER, ["a", "b"], columns)  # type: ignore[arg-type]
    assert made.vectors.dtype == np.float32
    assert made.vectors.flags.c_contiguous
    assert made.dim == 3
    assert made.vectors.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("ids", "shape"),
    [(["a"], (2, 3)), (["a", "b"], (1, 3)), (["a", "b"], (2,)), (["a"], (1, 1, 3))],
)
def test_shape_must_fit_the_ids(ids: list[str], shape: tuple[int, ...]) -> None:
    with pytest.raises(DimensionMismatch, match=rf"expected \({len(ids)}, D\), got \({shape[0]},"):
        VectorBatch(Entity.ITEM, ids, np.zeros(shape, np.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_value_must_be_finite(bad: float) -> None:
    with pytest.raises(InvalidInput, match=r"^2 vectors .* first is that of item 'i1'"):
        batch([1, 2], [bad, 2], [3, bad])


def test_float64_beyond_float32_is_refused() -> None:
    with pytest.raises(InvalidInput, match="infinite"):
        VectorBatch(Entity.ITEM, ["a"], np.array([[1e300]]))


def test_slices_cover_the_batch_in_order() -> None:
    pieces = list(batch([1], [2], [3], [4], [5]).slices(2))
    assert [list(piece.ids) for piece in pieces] == [["i0", "i1"], ["i2", "i3"], ["i4"]]
    assert [piece.vectors.tolist() for piece in pieces] == [[[1], [2]], [[3], [4]], [[5]]]
    assert {piece.entity for piece in pieces} == {Entity.ITEM}


@pytest.mark.parametrize("id", ["0", "  ", "a/b:c", "é" * (MAX_ID_BYTES // 2), "\0", "007"])
def test_id_is_kept_as_utf8(id: str) -> None:
    assert check_id(id) == id.encode()


@pytest.mark.parametrize("id", ["", "x" * (MAX_ID_BYTES + 1), "é" * (MAX_ID_BYTES // 2 + 1)])
def test_id_has_a_length(id: str) -> None:
    with pytest.raises(InvalidInput, match=f"1 to {MAX_ID_BYTES} bytes"):
        batch([1.0], ids=[id])


def test_id_must_be_unicode() -> None:
    with pytest.raises(InvalidInput, match=r"'\\ud800' is not valid Unicode"):
        batch([1.0], ids=["\ud800"])
