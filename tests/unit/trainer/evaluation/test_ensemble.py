"""Stacked layers against the layers of PyTorch, one member at a time."""

import pytest
import torch
from torch import Tensor, nn

from trainer.evaluation.ensemble import Dropout, Ensemble, Member, Normalised

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MEMBERS = [
    Member("likes", seed, hidden=7, dropout=p) for seed, p in ((0, 0.0), (1, 0.25), (2, 0.5))
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(ensemble: Ensemble, e: int) -> nn.Sequential:
    """Build member ``e`` of layers of PyTorch, with its weights and without dropout."""
    layers: list[nn.Module] = []
    for layer in ensemble.layers:
        if isinstance(layer, Normalised):
            outputs, inputs = layer.weight.shape[1:]
            norm = nn.BatchNorm1d(outputs)
            norm.load_state_dict(
                {
                    "weight": layer.gain[e],
                    "bias": layer.bias[e],
                    "running_mean": layer.running_mean[e],
                    "running_var": layer.running_var[e],
                    "num_batches_tracked": torch.tensor(0),
                }
            )
            linear = nn.Linear(inputs, outputs, bias=False)
            linear.load_state_dict({"weight": layer.weight[e]})
            layers += [linear, norm]
        elif isinstance(layer, nn.ReLU):
            layers.append(nn.ReLU())
    last = nn.Linear(ensemble.hidden, 1)
    final = ensemble.layers[-1]
    last.load_state_dict({name: value[e] for name, value in final.state_dict().items()})
    return nn.Sequential(*layers, last)


@pytest.mark.parametrize("hidden_layers", [1, 2])
def test_values_and_gradients_are_those_of_separate_layers(hidden_layers: int) -> None:
    members = [Member("likes", seed, hidden=7, dropout=0.0) for seed in range(3)]
    ensemble = Ensemble(5, hidden_layers, members)
    models = [plain(ensemble, e) for e in range(3)]
    for step in range(3):
        x = 3.0 + normal(3, 20, 5, seed=step)
        torch.autograd.backward((ensemble(x.mT) ** 2).mean(dim=1).sum())
        for own, model in zip(x, models, strict=True):
            torch.autograd.backward((model(own).squeeze(1) ** 2).mean())
    for e, model in enumerate(models):
        grads = [p.grad[e] for p in ensemble.parameters() if p.grad is not None]
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) == len(expected) == 3 * hidden_layers + 2
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)
    x = normal(1, 9, 5, seed=9)
    scores = ensemble.eval()(x.mT)  # the same rows to all, by the running statistics
    for own, model in zip(scores, models, strict=True):
        torch.testing.assert_close(own, model.eval()(x[0]).squeeze(1), rtol=1e-5, atol=1e-5)


def test_constant_inputs_are_normalised_to_nothing() -> None:
    layer = Normalised(4, 3, [MEMBERS[0].generator("weights", CPU)])
    torch.testing.assert_close(layer(torch.full((1, 4, 8), 5.0)), torch.zeros(1, 3, 8))


def test_dropout_keeps_each_members_share_and_the_mean() -> None:
    layer = Dropout([member.dropout for member in MEMBERS])
    layer.generators = [member.generator("dropout", CPU) for member in MEMBERS]
    dropped = layer(torch.ones(3, 100, 301))
    assert (dropped[0] == 1).all()
    for own, share in ((dropped[1], 0.25), (dropped[2], 0.5)):
        assert own.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)])
        assert float((own == 0).float().mean()) == pytest.approx(share, abs=0.01)
        columns = (own == 0).float().mean(dim=0)
        assert float(columns.std()) == pytest.approx((share * (1 - share) / 100) ** 0.5, rel=0.15)
    assert not torch.equal(dropped[1] == 0, layer(torch.ones(3, 100, 301))[1] == 0)


def test_dropout_of_a_member_is_its_own() -> None:
    layer = Dropout([0.25, 0.5])
    layer.generators = [member.generator("dropout", CPU) for member in MEMBERS[1:]]
    alone = Dropout([0.5])
    alone.generators = [MEMBERS[2].generator("dropout", CPU)]
    for _ in range(2):
        together = layer(torch.ones(2, 5, 7))
        assert torch.equal(together[1:], alone(torch.ones(1, 5, 7)))


def test_first_weights_are_spread_as_those_of_a_linear_layer() -> None:
    ensemble = Ensemble(64, 1, [Member("likes", seed, hidden=128, dropout=0.0) for seed in (0, 1)])
    weight = ensemble.state_dict()["layers.0.weight"]
    expected = nn.Linear(64, 128).state_dict()["weight"]
    assert float(weight.abs().max()) <= 64**-0.5
    assert float(weight.std()) == pytest.approx(float(expected.std()), rel=0.02)
    assert not torch.equal(weight[0], weight[1])


def test_generators_depend_on_task_seed_and_purpose_alone() -> None:
    def first(member: Member, purpose: str = "order") -> int:
        return int(torch.randint(2**60, (), generator=member.generator(purpose, CPU)))

    member = Member("likes", 0, hidden=8, dropout=0.25)
    assert first(member) == first(Member("likes", 0, hidden=16, dropout=0.5))
    others = [first(Member("likes", 1, 8, 0.25)), first(Member("buys", 0, 8, 0.25))]
    assert len({first(member), first(member, "weights"), *others}) == 4
