"""Fitted maps against NumPy's solver, gradient descent, random search, and their definitions."""

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from backcast import closed_form
from backcast.alignment import alignment_gram
from backcast.closed_form import least_squares, truncation, zero_padded_procrustes
from backcast.errors import DimensionMismatch, InvalidInput
from backcast.transforms import AffineMap

Array = NDArray[np.float64]


def problem(nodes: int, dim: int, target_dim: int, *, seed: int = 0) -> tuple[Array, Array]:
    """Return x (n, D_k) and y (n, D_j), y a noisy affine function of x, both away from zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(nodes, dim)) + rng.normal(size=dim)
    y = x @ rng.normal(size=(dim, target_dim)) + 0.5 * rng.normal(size=(nodes, target_dim))
    return x, y + rng.normal(size=target_dim)


def mean_square(found: AffineMap, x: Array, y: Array) -> float:
    """Return the mean over nodes of ‖W x + b − y‖²."""
    return float(((found(x) - y) ** 2).sum(axis=1).mean())


def bias_of(found: AffineMap) -> Array:
    assert found.bias is not None
    return found.bias


shapes = st.tuples(st.integers(12, 30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))


class TestLeastSquares:
    @given(shapes)
    def test_is_numpys_solution(self, case: tuple[int, int, int, int]) -> None:
        nodes, dim, target_dim, seed = case
        x, y = problem(nodes, dim, target_dim, seed=seed)
        found = least_squares(x, y, ridge=0.0)
        expected = np.linalg.lstsq(x, y)[0].T
        np.testing.assert_allclose(found.weight, expected, rtol=1e-6, atol=1e-6)
        assert found.bias is None
        assert (found.rows, found.cols) == (target_dim, dim)

    @given(shapes)
    def test_with_a_bias_is_numpys_solution_with_a_column_of_ones(
        self, case: tuple[int, int, int, int]
    ) -> None:
        nodes, dim, target_dim, seed = case
        x, y = problem(nodes, dim, target_dim, seed=seed)
        found = least_squares(x, y, bias=True, ridge=0.0)
        expected = np.linalg.lstsq(np.column_stack([x, np.ones(nodes)]), y)[0].T
        np.testing.assert_allclose(found.weight, expected[:, :-1], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(bias_of(found), expected[:, -1], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("bias", [False, True])
    def test_the_default_ridge_changes_next_to_nothing(self, bias: bool) -> None:
        x, y = problem(200, 6, 4)
        found, exact = least_squares(x, y, bias=bias), least_squares(x, y, bias=bias, ridge=0.0)
        np.testing.assert_allclose(found.weight, exact.weight, rtol=1e-4, atol=1e-5)
        assert mean_square(found, x, y) == pytest.approx(mean_square(exact, x, y), rel=1e-9)

    @pytest.mark.parametrize("bias", [False, True])
    def test_gradient_descent_goes_to_the_same_map(self, bias: bool) -> None:
        x, y = problem(100, 4, 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = torch.nn.Linear(4, 3, bias=bias).double()
        optimizer = torch.optim.LBFGS(
            linear.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0
        )
        inputs, wanted = torch.from_numpy(x), torch.from_numpy(y)

        def loss() -> float:
            optimizer.zero_grad()
            error = (linear(inputs) - wanted).square().sum(dim=1).mean()
            torch.autograd.backward(error)
            return float(error.detach())

        for _ in range(5):
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        found = least_squares(x, y, bias=bias, ridge=0.0)
        np.testing.assert_allclose(found.weight, linear.weight.detach().numpy(), atol=1e-6)
        if bias:
            np.testing.assert_allclose(bias_of(found), linear.bias.detach().numpy(), atol=1e-6)

    def test_the_ridge_is_a_share_of_the_mean_squared_coordinate(self) -> None:
        x, y = problem(50, 4, 3)
        rho = 0.1 * (x**2).mean()
        wide = np.vstack([x, np.sqrt(rho * len(x)) * np.eye(4)])  # ridge as more rows
        expected = np.linalg.lstsq(wide, np.vstack([y, np.zeros((4, 3))]))[0].T
        np.testing.assert_allclose(least_squares(x, y, ridge=0.1).weight, expected)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_the_scale_of_the_vectors_does_not_matter(self, scale: float) -> None:
        x, y = problem(50, 4, 3)
        for ridge in (1e-6, 0.5):
            one, other = (least_squares(factor * x, y, ridge=ridge) for factor in (1.0, scale))
            np.testing.assert_allclose(scale * other.weight, one.weight)

    @pytest.mark.parametrize("bias", [False, True])
    def test_dependent_coordinates_share_their_weight(self, bias: bool) -> None:
        x, y = problem(50, 3, 2)
        doubled = np.column_stack([x, x[:, 0]])
        found = least_squares(doubled, y, bias=bias)
        np.testing.assert_allclose(found.weight[:, 0], found.weight[:, 3], rtol=1e-4, atol=1e-6)
        best = mean_square(least_squares(x, y, bias=bias, ridge=0.0), x, y)
        assert mean_square(found, doubled, y) == pytest.approx(best, rel=1e-6)
        if not bias:
            shortest = np.linalg.lstsq(doubled, y)[0].T
            np.testing.assert_allclose(found.weight, shortest, rtol=1e-4, atol=1e-4)

    def test_with_fewer_nodes_than_dimensions_the_shortest_exact_map_is_taken(self) -> None:
        x, y = problem(3, 8, 2)
        found = least_squares(x, y)
        np.testing.assert_allclose(found(x), y, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.weight, np.linalg.lstsq(x, y)[0].T, rtol=1e-3, atol=1e-3)

    def test_one_node_with_a_bias_is_met_by_the_bias_alone(self) -> None:
        found = least_squares([[1.0, 2.0]], [[5.0]], bias=True)
        assert (found.weight.tolist(), bias_of(found).tolist()) == ([[0.0, 0.0]], [5.0])

    @pytest.mark.parametrize("bias", [False, True])
    def test_vectors_without_scale_are_mapped_to_what_is_left(self, bias: bool) -> None:
        _, y = problem(5, 1, 2)
        found = least_squares(np.zeros((5, 3)), y, bias=bias)
        assert not found.weight.any()
        expected = y.mean(axis=0) if bias else np.zeros(2)
        np.testing.assert_allclose(found(np.zeros(3)), expected)

    def test_single_precision_is_summed_in_double(self) -> None:
        x, y = (array.astype(np.float32) for array in problem(500, 5, 5))
        found = least_squares(x, y, ridge=0.0)
        expected = least_squares(x.astype(np.float64), y.astype(np.float64), ridge=0.0)
        assert np.array_equal(found.weight, expected.weight)
        assert found.weight.dtype == np.float64

    @pytest.mark.parametrize("bias", [False, True])
    def test_whole_weights_are_nodes_that_come_so_often(self, bias: bool) -> None:
        x, y = problem(20, 4, 3)
        often = np.arange(20) % 4
        found = least_squares(x, y, bias=bias, ridge=0.01, weights=0.3 * often)
        expected = least_squares(
            np.repeat(x, often, axis=0), np.repeat(y, often, axis=0), bias=bias, ridge=0.01
        )
        np.testing.assert_allclose(found.weight, expected.weight)
        if bias:
            np.testing.assert_allclose(bias_of(found), bias_of(expected))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1.0, -1.0, 1.0], "finite, 0 or more, and not all 0"),
            ([0.0, 0.0, 0.0], "finite, 0 or more, and not all 0"),
            ([1.0, np.nan, 1.0], "finite, 0 or more, and not all 0"),
            ([1.0, np.inf, 1.0], "finite, 0 or more, and not all 0"),
            ([1.0, 1.0], r"weights"),
        ],
    )
    def test_weights_that_weigh_nothing_are_refused(
        self, weights: list[float], message: str
    ) -> None:
        x, y = problem(3, 2, 1)
        with pytest.raises(InvalidInput, match=message):
            least_squares(x, y, weights=weights)

    def test_without_a_ridge_dependent_coordinates_are_refused(self) -> None:
        with pytest.raises(InvalidInput, match=r"linearly dependent.*Give a ridge above 0"):
            least_squares(np.zeros((5, 2)), np.ones((5, 1)), ridge=0.0)

    def test_what_it_is_given_stays_as_it_is(self) -> None:
        x, y = problem(10, 3, 2)
        before = x.copy(), y.copy()
        least_squares(x, y, bias=True)
        zero_padded_procrustes(x, y)
        assert np.array_equal(x, before[0])
        assert np.array_equal(y, before[1])


class TestMultiStep:
    """The multi-step loss δᵀ G δ and the single-step one have the same minimiser."""

    @staticmethod
    def minimiser(x: Array, y: Array, gram: Array, ridge: float = 0.0) -> Array:
        """Return the W that minimises the mean of δᵀ G δ + ρ ‖W‖²_F, as one problem in vec W."""
        root = np.linalg.cholesky(gram).T  # δᵀ G δ = ‖root δ‖²
        design = np.kron(x, root)  # root W x = (xᵀ ⊗ root) vec W, by columns
        wanted = (y @ root.T).reshape(-1)
        damping = np.sqrt(ridge * len(x)) * np.eye(design.shape[1])
        solved = np.linalg.lstsq(
            np.vstack([design, damping]), np.append(wanted, np.zeros(len(damping)))
        )[0]
        weight: Array = solved.reshape(x.shape[1], y.shape[1]).T
        return weight

    def test_it_has_the_same_minimiser(self) -> None:
        x, y = problem(60, 5, 4)
        rng = np.random.default_rng(1)
        older = [rng.normal(size=(3, 4)), 10 * rng.normal(size=(2, 4)), np.eye(4)]
        gram = alignment_gram([torch.from_numpy(weight) for weight in older]).numpy()
        assert np.linalg.cond(gram) > 50
        single = least_squares(x, y, ridge=0.0).weight
        np.testing.assert_allclose(self.minimiser(x, y, gram), single, rtol=1e-8, atol=1e-8)
        # Not so under a Frobenius ridge: the check above would see a difference.
        damped = [self.minimiser(x, y, g, ridge=1.0) for g in (gram, np.eye(4) / 4)]
        assert np.abs(damped[0] - damped[1]).max() > 0.01


def orthogonal(dim: int, rng: np.random.Generator) -> Array:
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def padded_square(found: AffineMap, x: Array, y: Array) -> float:
    """Return ‖X Rᵀ − [y 0]‖²_F for any orthogonal R whose first rows are the map's."""
    beyond = (x**2).sum() - (found(x) ** 2).sum()  # what R puts into the other coordinates
    return float(((found(x) - y) ** 2).sum() + beyond)


class TestProcrustes:
    @given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**31))
    def test_rows_are_orthonormal_and_nothing_grows(
        self, nodes: int, target_dim: int, more: int, seed: int
    ) -> None:
        x, y = problem(nodes, target_dim + more, target_dim, seed=seed)
        found = zero_padded_procrustes(x, y)
        gram = found.weight @ found.weight.T
        np.testing.assert_allclose(gram, np.eye(target_dim), atol=1e-12)
        assert found.bias is None
        lengths = np.linalg.norm(x, axis=1)
        assert (np.linalg.norm(found(x), axis=1) <= lengths * (1 + 1e-12)).all()
        if more == 0:
            np.testing.assert_allclose(
                found(x) @ found(x).T, x @ x.T, atol=1e-9 * lengths.max() ** 2
            )

    @pytest.mark.parametrize("more", [0, 1, 3])
    def test_no_orthogonal_map_is_better(self, more: int) -> None:
        x, y = problem(40, 3 + more, 3)
        found = zero_padded_procrustes(x, y)
        least = padded_square(found, x, y)
        rng = np.random.default_rng(2)
        completed = np.linalg.qr(found.weight.T, mode="complete")[0].T
        completed[:3] = found.weight
        assert padded_square(AffineMap(completed[:3]), x, y) == pytest.approx(least)
        padded = np.column_stack([y, np.zeros((40, more))])
        for size in (1e-3, 0.1, 10.0):
            for _ in range(200):
                # near the solution, and anywhere
                turn = np.linalg.qr(np.eye(3 + more) + size * rng.normal(size=(3 + more,) * 2))[0]
                other = turn @ completed
                assert ((x @ other.T - padded) ** 2).sum() >= least - 1e-9
                assert padded_square(AffineMap(other[:3]), x, y) >= least - 1e-9

    def test_in_the_plane_it_is_the_best_of_all_angles(self) -> None:
        x, y = problem(30, 2, 2, seed=4)
        angles = np.linspace(0, 2 * np.pi, 20_001)
        turned = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
        candidates = np.concatenate([turned, turned * [[[1.0]], [[-1.0]]]], axis=2)  # and mirrored
        errors = (np.einsum("ijk,nj->kni", candidates, x) - y) ** 2
        at = errors.sum(axis=(1, 2)).argmin()
        np.testing.assert_allclose(
            zero_padded_procrustes(x, y).weight, candidates[:, :, at], atol=4e-4
        )

    @pytest.mark.parametrize("more", [0, 2])
    def test_vectors_that_were_turned_are_turned_back(self, more: int) -> None:
        rng = np.random.default_rng(0)
        y = rng.normal(size=(50, 4))
        rotation = orthogonal(4 + more, rng)
        x = np.column_stack([y, np.zeros((50, more))]) @ rotation
        found = zero_padded_procrustes(x, y)
        np.testing.assert_allclose(found(x), y, atol=1e-12)
        np.testing.assert_allclose(found.weight, rotation[:4], atol=1e-12)

    def test_an_equal_dimension_is_needed_at_the_least(self) -> None:
        x, y = problem(10, 2, 3)
        message = "older vectors: expected at most 2 columns, got 3"
        with pytest.raises(DimensionMismatch, match=message):
            zero_padded_procrustes(x, y)


class TestTruncation:
    def test_it_keeps_the_first_coordinates(self) -> None:
        assert truncation(4, 2)([1.0, 2.0, 3.0, 4.0]).tolist() == [1.0, 2.0]
        assert np.array_equal(truncation(3, 3).weight, np.eye(3))
        assert truncation(3, 3).bias is None

    def test_there_must_be_enough_of_them(self) -> None:
        message = "truncation: expected at least 3 coordinates, got 2"
        with pytest.raises(DimensionMismatch, match=message):
            truncation(2, 3)


FITS = pytest.mark.parametrize("fit", [least_squares, zero_padded_procrustes])
Fit = Callable[[Array, Array], AffineMap]


@FITS
@pytest.mark.parametrize(
    ("newer", "older"),
    [((3, 2), (4, 2)), ((3,), (3, 2)), ((3, 2), (3,)), ((1, 3, 2), (1, 2)), ((), ())],
    ids=["nodes", "flat newer", "flat older", "stacked", "numbers"],
)
def test_arrays_that_do_not_fit_are_refused(
    fit: Fit, newer: tuple[int, ...], older: tuple[int, ...]
) -> None:
    message = r"newer and older: expected \(n, D_k\) and \(n, D_j\), got "
    with pytest.raises(DimensionMismatch, match=message):
        fit(np.ones(newer), np.ones(older))


@FITS
def test_no_vectors_are_refused(fit: Fit) -> None:
    with pytest.raises(InvalidInput, match="A map cannot be fitted on no vectors"):
        fit(np.ones((0, 3)), np.ones((0, 2)))


@FITS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["newer", "older"])
def test_values_that_are_no_numbers_are_refused(fit: Fit, name: str, value: float) -> None:
    arrays = dict(zip(("newer", "older"), problem(5, 3, 2), strict=True))
    arrays[name][4, 1] = value
    with pytest.raises(InvalidInput, match=f"The {name} vectors hold NaN or infinite values"):
        fit(arrays["newer"], arrays["older"])


def test_the_example_runs() -> None:
    results = doctest.testmod(closed_form)
    assert results.attempted >= 2
    assert results.failed == 0
