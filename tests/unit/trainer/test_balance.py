"""Users and items have the same say, whatever their number and spread."""

import pytest
import torch

from trainer.balance import balanced_weights, spread


def vectors() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    users = 7.0 + 3.0 * torch.randn(30, 4, generator=generator)
    return torch.cat([users, 0.2 * torch.randn(10, 4, generator=generator)])


def test_each_kind_counts_as_a_share_of_its_own_variance() -> None:
    z = vectors()
    weights = balanced_weights(z, 30)
    assert weights.dtype is torch.float64
    for kind in (slice(0, 30), slice(30, 40)):
        deviations = (z[kind] - z[kind].mean(dim=0)).double()
        assert float((weights[kind, None] * deviations**2).sum()) == pytest.approx(0.5)
        assert len(set(weights[kind].tolist())) == 1
    assert float(spread(z.double(), 30, weights)) == pytest.approx(1.0)


def test_where_one_kind_stands_is_no_spread() -> None:
    z = vectors()
    moved = torch.cat([z[:30] - 50.0, z[30:]])
    torch.testing.assert_close(
        balanced_weights(moved, 30), balanced_weights(z, 30), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("users", [0, 1, 30])
def test_a_kind_without_spread_is_weighted_by_that_of_all(users: int) -> None:
    z = vectors()
    z[:users] = z[:users].mean(dim=0) if users else z[:users]
    z[:users] += 1e-7 * torch.randn(users, 4)  # rounding
    weights = balanced_weights(z, users)
    everything = float(((z - z.mean(dim=0)).double() ** 2).sum())
    assert weights[:users].tolist() == pytest.approx([0.5 / everything] * users, rel=1e-3)
    assert weights.shape == (40,)
    assert weights.isfinite().all()


def test_vectors_that_are_all_equal_weigh_the_same() -> None:
    assert balanced_weights(torch.ones(6, 2), 4).tolist() == [0.5] * 6
