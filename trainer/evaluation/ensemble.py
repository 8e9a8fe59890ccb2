"""Small MLPs trained side by side, as one module with stacked weights.

Every member draws its first weights, the order of its examples and its dropout from generators of
its own, and is normalised by its own batch: what it becomes does not depend on its company.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

NORM_EPSILON = 1e-5
NORM_MOMENTUM = 0.1
"""As ``nn.BatchNorm1d``."""


@dataclass(frozen=True)
class Member:
    """One MLP of an ensemble, by what it is trained for and how."""

    task: str
    seed: int
    hidden: int
    dropout: float

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """Return a new generator that depends on the task, the seed and the purpose alone."""
        digest = hashlib.sha256(f"{self.task}/{self.seed}/{purpose}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


class Ensemble(nn.Module):
    """E members of one hidden width, each Normalised–ReLU–Dropout–(Normalised–Dropout–)Linear.

    Shapes:
        input (E, D, b), or (1, D, b) for the same rows to each; output (E, b), logits.
    """

    def __init__(self, inputs: int, hidden_layers: int, members: Sequence[Member]) -> None:
        super().__init__()
        (hidden,) = {member.hidden for member in members}
        self.members, self.inputs, self.hidden = tuple(members), inputs, hidden
        generators = [member.generator("weights", torch.device("cpu")) for member in members]
        dropouts = [member.dropout for member in members]
        layers: list[nn.Module] = []
        for depth in range(hidden_layers):
            layers.append(Normalised(hidden if depth else inputs, hidden, generators))
            layers.append(Dropout(dropouts))
            if depth == 0:
                layers.append(nn.ReLU(inplace=True))  # it may as well come after the zeros
        layers.append(Linear(hidden, 1, generators))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layers(x.expand(len(self.members), -1, -1))
        return logits.squeeze(1)

    def draw_dropout_from(self, generators: Sequence[torch.Generator]) -> None:
        """Set the generators of dropout, one per member; training needs them."""
        for module in self.layers:
            if isinstance(module, Dropout):
                module.generators = generators


class Linear(nn.Module):
    """E times ``nn.Linear`` side by side, with its first weights.

    Shapes:
        input (E, inputs, b), output (E, outputs, b); weight (E, outputs, inputs),
        bias (E, outputs).
    """

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.weight = nn.Parameter(_drawn((outputs, inputs), inputs, generators))
        self.bias = nn.Parameter(_drawn((outputs,), inputs, generators))

    def forward(self, x: Tensor) -> Tensor:
        """Map each member's columns."""
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, x)


class Normalised(nn.Module):
    """E times ``nn.Linear`` without bias and ``nn.BatchNorm1d`` side by side.

    y = γ (W x − μ) / σ + β. A bias would be taken away again with the mean. Mean and variance of
    W x over a batch follow from those of x: they are W x̄ and diag(W Cov(x) Wᵀ). So one product
    with γ/σ · W is all that is done to the b columns.

    Shapes:
        input (E, inputs, b), output (E, outputs, b); weight (E, outputs, inputs), all else
        (E, outputs).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        shape = (len(generators), outputs)
        self.weight = nn.Parameter(_drawn((outputs, inputs), inputs, generators))
        self.gain = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map and normalise each member's columns."""
        if not self.training:
            gain = self.gain / (self.running_var + NORM_EPSILON).sqrt()
            return self._map(x, gain, self.bias - gain * self.running_mean)
        centre = x.mean(dim=2, keepdim=True)  # (E, inputs, 1)
        centred = x - centre
        covariance = centred @ centred.mT / x.shape[2]  # (E, inputs, inputs)
        variance = ((self.weight @ covariance) * self.weight).sum(dim=2).clamp(min=0)
        self._remember((self.weight @ centre).squeeze(2), variance, x.shape[2])
        return self._map(centred, self.gain / (variance + NORM_EPSILON).sqrt(), self.bias)

    def _map(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias.unsqueeze(2), gain.unsqueeze(2) * self.weight, x)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.running_mean.lerp_(mean, NORM_MOMENTUM)
        self.running_var.lerp_(variance * (count / (count - 1)), NORM_MOMENTUM)


class Dropout(nn.Module):
    """E times ``nn.Dropout`` side by side, each with its own share and its own generator.

    In place. A share is rounded to 1/65536.

    Shapes:
        input and output (E, h, b).
    """

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__()
        self.shares = tuple(shares)
        self.generators: Sequence[torch.Generator] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Drop each value with its member's probability; scale up what stays."""
        return x.mul_(self._mask(x)) if self.training and any(self.shares) else x

    def _mask(self, x: Tensor) -> Tensor:
        """Return what to multiply with: zero or the scale, (E, h, b)."""
        cut = [min(round(share * 2**16), 2**16 - 1) - 2**15 for share in self.shares]
        scale = [1 / (1 - share) for share in self.shares]
        mask = torch.empty_like(x)
        torch.ge(self._bits(x), _column(cut, torch.int16, x), out=mask)
        return mask.mul_(_column(scale, x.dtype, x))

    def _bits(self, x: Tensor) -> Tensor:
        """Return random int16 numbers (E, h, b); those of a member without dropout are anything.

        Four are cut from each 64-bit draw: drawing a number for each value is what dropout costs.
        """
        members, hidden, batch = x.shape
        draws = x.new_empty((members, ceil(hidden * batch / 4)), dtype=torch.int64)
        for own, share, generator in zip(draws, self.shares, self.generators, strict=True):
            if share:
                own.random_(-(2**63), None, generator=generator)
        return draws.view(torch.int16)[:, : hidden * batch].reshape(x.shape)


def _column(values: Sequence[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device).view(-1, 1, 1)


def _drawn(shape: tuple[int, ...], inputs: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw from U(-1/√inputs, 1/√inputs), as ``nn.Linear`` does: (E, *shape)."""
    bound = inputs**-0.5
    return torch.stack(
        [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
    )
