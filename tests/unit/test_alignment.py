"""The alignment loss against the sum that it stands for."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from backcast.alignment import (
    AlignmentLoss,
    BackwardTransformation,
    LeastSquaresHead,
    alignment_gram,
)
from backcast.closed_form import least_squares
from backcast.errors import DimensionMismatch, InvalidInput


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # On arrays this small, two threads only wait for each other: for seconds, on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive(weights: Sequence[Tensor], mapped: Tensor, target: Tensor) -> Tensor:
    """(1/k) Σ_j mean over x, mean over d of (W_{k-1}^j δ(x))_d², one number at a time."""
    total = torch.zeros((), dtype=mapped.dtype)
    for weight in weights:
        for z, wanted in zip(mapped, target, strict=True):
            for row in weight:
                total = total + (row @ (z - wanted)) ** 2 / (len(weight) * len(mapped))
    return total / len(weights)


def older_maps(dims: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Composed weights W_{k-1}^j, (D_j, D_{k-1}) for j = 0..k-1, the identity last, float64."""
    composed = [torch.eye(dims[-1], dtype=torch.float64)]
    for rows, cols in zip(reversed(dims[:-1]), reversed(dims[1:]), strict=True):
        step = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
        composed.append(step @ composed[-1])
    return composed[::-1]


def loss_of(weights: Sequence[Tensor]) -> AlignmentLoss:
    """Make the loss as a float64 training script does."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return AlignmentLoss(alignment_gram(weights))
    finally:
        torch.set_default_dtype(default)


shapes = st.tuples(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),  # D_0 .. D_{k-1}
    st.integers(1, 6),  # nodes
    st.integers(0, 2**31),  # seed
)


@given(shapes)
def test_gram_form_is_the_sum_over_versions(case: tuple[list[int], int, int]) -> None:
    dims, nodes, seed = case
    generator = torch.Generator().manual_seed(seed)
    weights = older_maps(dims, generator)
    mapped, target = torch.randn(2, nodes, dims[-1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        loss_of(weights)(mapped, target), naive(weights, mapped, target), rtol=1e-10, atol=1e-10
    )
    single = AlignmentLoss(alignment_gram(weights))
    assert single.gram.dtype is torch.float32
    torch.testing.assert_close(
        single(mapped.float(), target.float()).double(),
        naive(weights, mapped, target),
        rtol=1e-4,
        atol=1e-4,
    )


@given(shapes)
def test_gradients_are_those_of_the_sum(case: tuple[list[int], int, int]) -> None:
    dims, nodes, seed = case
    generator = torch.Generator().manual_seed(seed)
    weights = older_maps(dims, generator)
    target = torch.randn(nodes, dims[-1], generator=generator, dtype=torch.float64)
    z = torch.randn(nodes, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(dims[-1], 3, generator=generator, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(loss_of(weights)(z @ w.T, target), (z, w))
    want = torch.autograd.grad(naive(weights, z @ w.T, target), (z, w))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@given(shapes)
def test_weights_count_a_node_as_often_as_it_is_met(case: tuple[list[int], int, int]) -> None:
    dims, nodes, seed = case
    generator = torch.Generator().manual_seed(seed)
    older = older_maps(dims, generator)
    mapped, target = torch.randn(2, nodes, dims[-1], generator=generator, dtype=torch.float64)
    mapped.requires_grad_()
    met = torch.randint(nodes, (9,), generator=generator)
    weights = torch.bincount(met, minlength=nodes).double() / len(met)
    found = loss_of(older)(mapped, target, weights)
    expected = naive(older, mapped[met], target[met])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(found, mapped),
        torch.autograd.grad(expected, mapped),
        rtol=1e-9,
        atol=1e-9,
    )


def test_equal_weights_that_add_up_to_one_are_the_mean() -> None:
    mapped, target = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    loss = AlignmentLoss(alignment_gram([torch.eye(3)]))
    found = loss(mapped, target, torch.full((4,), 0.25))
    torch.testing.assert_close(found, loss(mapped, target))


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = loss_of(older_maps([2, 3, 4], generator))
    target = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    transformation = BackwardTransformation(6, 4, bias=True).double()
    z = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in transformation.parameters())

    def aligned(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        aligned: Tensor = loss(torch.nn.functional.linear(z, weight, bias), target)
        return aligned

    assert gradcheck(aligned, (z, weight, bias))


def test_single_step_is_the_mean_square() -> None:
    mapped, target = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
    single = AlignmentLoss(alignment_gram([torch.eye(5)]))
    assert single.gram.tolist() == (torch.eye(5) / 5).tolist()
    torch.testing.assert_close(single(mapped, target), torch.nn.functional.mse_loss(mapped, target))


def test_published_scaling_by_hand() -> None:
    # k = 2, D_0 = 1, D_1 = 2, δ = (1, 2), W_1^0 = (3, 1): means over dimensions, then over steps
    weights = [torch.tensor([[3.0, 1.0]]), torch.eye(2)]
    gram = alignment_gram(weights)
    assert gram.tolist() == [[4.75, 1.5], [1.5, 0.75]]
    loss = AlignmentLoss(gram)(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    assert loss.item() == ((3 + 2) ** 2 / 1 + (1 + 4) / 2) / 2


def test_loss_is_the_mean_over_nodes() -> None:
    loss = AlignmentLoss(alignment_gram([torch.eye(1)]))
    assert loss(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)).item() == (1 + 9) / 2


def test_gram_is_float64_and_carries_no_gradient() -> None:
    older = torch.randn(2, 3, requires_grad=True)
    gram = alignment_gram([older, torch.eye(3)])
    assert (gram.dtype, gram.requires_grad) == (torch.float64, False)
    assert torch.equal(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() >= 1 / (2 * 3) - 1e-12


def test_no_gradient_flows_into_the_target() -> None:
    mapped = torch.ones(2, 3, requires_grad=True)
    target = torch.zeros(2, 3, requires_grad=True)
    AlignmentLoss(alignment_gram([torch.eye(3)]))(mapped, target).backward()
    assert target.grad is None
    assert mapped.grad is not None
    torch.testing.assert_close(mapped.grad, torch.full((2, 3), 2 / 6))


def test_gram_moves_with_the_module_but_is_not_learned() -> None:
    loss = AlignmentLoss(alignment_gram([torch.eye(2)]))
    assert list(loss.parameters()) == []
    assert list(loss.state_dict()) == ["gram"]
    assert loss.to(torch.float64).gram.dtype is torch.float64


def test_transformation_maps_by_its_weight_and_bias() -> None:
    transformation = BackwardTransformation(3, 2, bias=True)
    z = torch.randn(4, 5, 3)
    assert transformation.bias is not None
    assert transformation.weight.shape == (2, 3)
    want = torch.einsum("ij,...j->...i", transformation.weight, z) + transformation.bias
    torch.testing.assert_close(transformation(z), want)


def test_transformation_has_no_bias_unless_asked() -> None:
    assert BackwardTransformation(3, 2).bias is None


def test_plain_training_loop_finds_the_least_squares_map() -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    wanted = z @ torch.randn(4, 3, generator=generator, dtype=torch.float64) + noise
    best = torch.linalg.lstsq(z, wanted).solution.T  # the same for every positive definite G
    transformation = BackwardTransformation(4, 3).double()
    alignment = loss_of(older_maps([2, 3], generator))
    optimizer = torch.optim.SGD(transformation.parameters(), lr=0.2, momentum=0.8)
    for _ in range(300):
        optimizer.zero_grad()
        alignment(transformation(z), wanted).backward()
        optimizer.step()
    torch.testing.assert_close(transformation.weight.detach(), best, rtol=1e-6, atol=1e-6)


class TestLeastSquaresHead:
    @staticmethod
    def vectors(seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return z (40, 5) and a target (40, 3), float64, both away from zero."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(40, 5, generator=generator, dtype=torch.float64) + 2.0
        mixed = z @ torch.randn(5, 3, generator=generator, dtype=torch.float64) - 1.0
        return z, mixed + torch.randn(40, 3, generator=generator, dtype=torch.float64)

    def test_maps_by_the_closed_form(self) -> None:
        z, target = self.vectors()
        expected = least_squares(z.numpy(), target.numpy(), bias=True, ridge=1e-4)(z.numpy())
        torch.testing.assert_close(
            LeastSquaresHead(target)(z), torch.from_numpy(expected), rtol=1e-9, atol=1e-9
        )

    def test_weighs_nodes_as_the_closed_form_does(self) -> None:
        z, target = self.vectors()
        weights = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        fitted = least_squares(
            z.numpy(), target.numpy(), bias=True, ridge=1e-4, weights=weights.numpy()
        )
        expected = torch.from_numpy(fitted(z.numpy()))
        found = LeastSquaresHead(target, weights=5.0 * weights)(z)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("scale", [1e-7, 0.01, 100.0])
    def test_the_scale_of_the_vectors_does_not_matter(self, scale: float) -> None:
        z, target = self.vectors()
        head = LeastSquaresHead(target)
        torch.testing.assert_close(head(scale * z + 3.0), head(z))

    def test_the_gradient_of_the_loss_is_that_through_the_solution(self) -> None:
        # At the optimum the solution's own gradient is zero, so leaving it out changes nothing.
        z, target = self.vectors()
        z.requires_grad_()
        loss = loss_of([torch.eye(3, dtype=torch.float64)])
        (found,) = torch.autograd.grad(loss(LeastSquaresHead(target, ridge=0.0)(z), target), z)
        ones = torch.ones(len(z), 1, dtype=torch.float64)
        wide = torch.cat([z, ones], dim=1)
        solved = torch.linalg.solve(wide.T @ wide, wide.T @ target)
        (expected,) = torch.autograd.grad(loss(wide @ solved, target), z)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)

    def test_dependent_coordinates_and_vectors_that_are_all_equal_are_mapped(self) -> None:
        z, target = self.vectors()
        doubled = torch.cat([z, z[:, :1]], dim=1)
        head = LeastSquaresHead(target)
        torch.testing.assert_close(head(doubled), head(z), rtol=1e-3, atol=1e-3)
        constant = head(torch.ones(40, 5, dtype=torch.float64))
        torch.testing.assert_close(constant, target.mean(dim=0).expand(40, -1))

    @pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
    def test_weights_that_weigh_nothing_are_refused(self, weights: list[float]) -> None:
        with pytest.raises(InvalidInput, match="finite, 0 or more, and not all 0"):
            LeastSquaresHead(torch.ones(2, 3), weights=torch.tensor(weights))

    def test_rows_have_to_fit(self) -> None:
        with pytest.raises(DimensionMismatch, match="weights"):
            LeastSquaresHead(torch.ones(2, 3), weights=torch.ones(3))
        with pytest.raises(DimensionMismatch, match="vectors"):
            LeastSquaresHead(torch.ones(2, 3))(torch.ones(3, 4))

    def test_nothing_of_it_is_learned_or_kept(self) -> None:
        _, target = self.vectors()
        head = LeastSquaresHead(target)
        assert list(head.parameters()) == []
        assert list(head.state_dict()) == []
        assert head.to(torch.float32).target.dtype is torch.float32


def test_gram_needs_a_map() -> None:
    with pytest.raises(InvalidInput, match="at least one map"):
        alignment_gram([])


@pytest.mark.parametrize(
    "weights",
    [[torch.eye(3), torch.ones(2, 4)], [torch.ones(3)], [torch.eye(3), torch.ones(3)]],
    ids=["columns", "vector", "vector-after-matrix"],
)
def test_gram_needs_matrices_from_one_dimension(weights: list[Tensor]) -> None:
    with pytest.raises(DimensionMismatch, match="weight of an older map"):
        alignment_gram(weights)


@pytest.mark.parametrize(
    ("mapped", "target"),
    [((2, 3), (2, 4)), ((2, 4), (2, 4)), ((2, 3), (1, 3)), ((3,), (2, 3))],
)
def test_loss_needs_two_equal_shapes(mapped: tuple[int, ...], target: tuple[int, ...]) -> None:
    loss = AlignmentLoss(alignment_gram([torch.eye(3)]))
    with pytest.raises(DimensionMismatch, match=r"mapped and target: expected \(n, 3\)"):
        loss(torch.zeros(mapped), torch.zeros(target))
