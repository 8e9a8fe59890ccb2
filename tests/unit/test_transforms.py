"""Composed maps against plain loops over their steps."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from backcast.errors import DimensionMismatch, InvalidInput
from backcast.transforms import AffineMap, Maps, compose
from backcast.versions import Lineage

Float64s = NDArray[np.float64]


def random_map(rng: np.random.Generator, rows: int, cols: int, *, bias: bool) -> AffineMap:
    return AffineMap(rng.normal(size=(rows, cols)), rng.normal(size=rows) if bias else None)


def by_loop(step: AffineMap, z: Float64s) -> Float64s:
    """W z + b for one vector, one multiplication at a time."""
    mapped = np.zeros(step.rows)
    for i in range(step.rows):
        for j in range(step.cols):
            mapped[i] += step.weight[i, j] * z[j]
        if step.bias is not None:
            mapped[i] += step.bias[i]
    return mapped


def line(length: int) -> Lineage:
    return Lineage({k: k - 1 if k else None for k in range(length)})


def close(got: Float64s, want: Float64s) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10 * (1 + np.abs(want).max()))


@st.composite
def chains(draw: Any) -> tuple[list[int], Maps, Float64s]:
    """Dimensions of versions 0..k, the backward map of each, and one vector of version k."""
    dims = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    maps = {
        (k, k - 1): random_map(rng, dims[k - 1], dims[k], bias=draw(st.booleans()))
        for k in range(1, len(dims))
    }
    return dims, maps, rng.normal(size=dims[-1])


@given(chains())
def test_composition_is_one_step_after_another(case: tuple[list[int], Maps, Float64s]) -> None:
    dims, maps, z = case
    live = len(dims) - 1
    composed = compose(live, dims[-1], line(len(dims)), maps)
    assert sorted(composed) == list(range(len(dims)))
    for j in range(live, -1, -1):
        if j < live:
            z = by_loop(maps[j + 1, j], z)
        assert (composed[j].rows, composed[j].cols) == (dims[j], dims[live])
        close(composed[j](case[2]), z)


@given(chains(), st.data())
def test_direct_map_replaces_the_product_and_older_ones_follow_it(
    case: tuple[list[int], Maps, Float64s], data: st.DataObject
) -> None:
    dims, backward, z = case
    live = len(dims) - 1
    targets = data.draw(st.sets(st.integers(0, live - 1))) if live else set()
    rng = np.random.default_rng(7)
    direct = {(live, j): random_map(rng, dims[j], dims[live], bias=True) for j in targets}
    composed = compose(live, dims[live], line(len(dims)), {**backward, **direct})
    want = z
    for j in range(live - 1, -1, -1):
        want = by_loop(direct[live, j], z) if j in targets else by_loop(backward[j + 1, j], want)
        close(composed[j](z), want)


def test_hand_numbers() -> None:
    first = AffineMap(np.array([[1.0, 2.0]]), np.array([10.0]))
    second = AffineMap(np.array([[3.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), np.array([1.0, -1.0]))
    composed = compose(2, 3, line(3), {(1, 0): first, (2, 1): second})
    assert composed[0].weight.tolist() == [[3.0, 2.0, 1.0]]
    assert composed[0].bias is not None
    assert composed[0].bias.tolist() == [9.0]  # 1·1 + 2·(−1) + 10
    assert composed[0]([1.0, 1.0, 1.0]).tolist() == [15.0]


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(0, 2**32), st.booleans())
def test_composition_is_associative(dims: list[int], seed: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (random_map(rng, dims[n], dims[n + 1], bias=bias) for n in range(3))
    z = rng.normal(size=(3, dims[3]))
    close(a.after(b).after(c)(z), a.after(b.after(c))(z))
    close(a.after(b).after(c)(z), a(b(c(z))))


@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_identity_changes_nothing(rows: int, cols: int, bias: bool) -> None:
    step = random_map(np.random.default_rng(rows), rows, cols, bias=bias)
    for same in (step.after(AffineMap.identity(cols)), AffineMap.identity(rows).after(step)):
        assert same.weight.tolist() == step.weight.tolist()
        assert (same.bias is None) == (step.bias is None)
        assert np.array_equal(same(np.zeros(cols)), step(np.zeros(cols)))


@pytest.mark.parametrize(
    ("outer", "inner", "want"),
    [
        (None, None, None),
        ([5.0], None, [5.0]),
        (None, [1.0, 1.0], [3.0]),
        ([5.0], [1.0, 1.0], [8.0]),
    ],
)
def test_bias_composes(
    outer: list[float] | None, inner: list[float] | None, want: list[float] | None
) -> None:
    first = AffineMap(np.array([[1.0, 2.0]]), None if outer is None else np.array(outer))
    second = AffineMap(np.eye(2), None if inner is None else np.array(inner))
    bias = first.after(second).bias
    assert (None if bias is None else bias.tolist()) == want


def test_chain_skips_a_rolled_back_sibling() -> None:
    rng = np.random.default_rng(0)
    maps = {
        (1, 0): random_map(rng, 2, 3, bias=False),
        (2, 1): random_map(rng, 3, 9, bias=False),  # rolled back: 3 was aligned to 1 as well
        (3, 1): random_map(rng, 3, 4, bias=False),
    }
    z = rng.normal(size=4)
    composed = compose(3, 4, Lineage({0: None, 1: 0, 2: 1, 3: 1}), maps)
    assert sorted(composed) == [0, 1, 3]
    close(composed[1](z), by_loop(maps[3, 1], z))
    close(composed[0](z), by_loop(maps[1, 0], by_loop(maps[3, 1], z)))


def test_direct_map_of_an_older_version_is_not_used() -> None:
    rng = np.random.default_rng(0)
    backward = {(k, k - 1): random_map(rng, k, k + 1, bias=False) for k in (1, 2, 3)}
    direct = {(2, 0): random_map(rng, 1, 3, bias=False)}
    composed = compose(3, 4, line(4), {**backward, **direct})
    assert composed[0].weight.tolist() == compose(3, 4, line(4), backward)[0].weight.tolist()


def test_missing_map_is_named() -> None:
    maps = {(2, 1): AffineMap.identity(2)}
    with pytest.raises(InvalidInput, match="Version 1 has no map back to its parent 0"):
        compose(2, 2, line(3), maps)


@pytest.mark.parametrize(
    "maps",
    [
        {(1, 0): AffineMap(np.ones((2, 3))), (2, 1): AffineMap(np.ones((4, 4)))},
        {(1, 0): AffineMap(np.ones((2, 3))), (2, 1): AffineMap(np.ones((3, 5)))},
        {
            (1, 0): AffineMap(np.ones((2, 3))),
            (2, 1): AffineMap(np.ones((3, 4))),
            (2, 0): AffineMap(np.ones((2, 5))),
        },
    ],
    ids=["neighbours", "live", "direct"],
)
def test_maps_must_fit(maps: Maps) -> None:
    with pytest.raises(DimensionMismatch):
        compose(2, 4, line(3), maps)


@given(st.integers(2, 6), st.integers(0, 2**32))
def test_composition_has_float64_accuracy(length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [rng.standard_normal((4, 4), dtype=np.float32) for _ in range(length)]
    maps = {(k, k - 1): AffineMap(step.astype(np.float64)) for k, step in enumerate(steps, 1)}
    exact = np.array([[Fraction(int(i == j)) for j in range(4)] for i in range(4)])
    for step in steps:
        exact = exact @ np.array([[Fraction(float(w)) for w in row] for row in step])
    got = compose(length, 4, line(length + 1), maps)[0].weight
    bound = float(np.prod([np.linalg.norm(step) for step in steps]))
    assert np.abs(got - exact.astype(np.float64)).max() <= 1e-14 * bound


def test_map_applies_to_the_last_axis() -> None:
    step = AffineMap(np.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]), np.array([1.0, 0.0, 0.0]))
    assert step([1.0, 1.0]).tolist() == [4, 1, 1]
    assert step(np.ones((2, 5, 2))).tolist() == [[[4, 1, 1]] * 5] * 2
    assert step(np.ones((0, 2))).shape == (0, 3)
    assert step(np.ones(2, np.float32)).dtype == np.float64


def test_norm_is_the_largest_stretch() -> None:
    assert AffineMap(np.array([[0.0, 3.0, 0.0], [-2.0, 0.0, 0.0]])).norm == pytest.approx(3.0)


@pytest.mark.parametrize("shape", [(3,), (), (2, 2, 2), (0, 3), (3, 0)])
def test_weight_is_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(DimensionMismatch, match="weight"):
        AffineMap(np.ones(shape))


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
def test_bias_fits_the_rows(shape: tuple[int, ...]) -> None:
    with pytest.raises(DimensionMismatch, match=r"bias: expected \(2,\)"):
        AffineMap(np.ones((2, 3)), np.ones(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_are_finite(bad: float) -> None:
    with pytest.raises(InvalidInput, match="weight"):
        AffineMap(np.array([[1.0, bad]]))
    with pytest.raises(InvalidInput, match="bias"):
        AffineMap(np.ones((1, 2)), np.array([bad]))


def test_a_nan_that_signals_is_refused_without_a_warning() -> None:
    signalling: Any = np.array([[0x7FBFFFFF]], np.uint32).view(np.float32)
    with pytest.raises(InvalidInput, match="weight"):
        AffineMap(signalling)
    with pytest.raises(InvalidInput, match="bias"):
        AffineMap(np.ones((1, 2)), signalling[0])


@pytest.mark.parametrize("shape", [(2,), (3, 2), ()])
def test_vectors_fit_the_columns(shape: tuple[int, ...]) -> None:
    with pytest.raises(DimensionMismatch, match=r"expected \(\.\.\., 3\)"):
        AffineMap(np.ones((2, 3)))(np.ones(shape))


def test_only_fitting_maps_compose() -> None:
    with pytest.raises(DimensionMismatch, match="expected 3 rows, got 2 rows"):
        AffineMap(np.ones((2, 3))).after(AffineMap(np.ones((2, 3))))
