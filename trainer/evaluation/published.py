"""The figures that the paper prints (arXiv 2206.03040, λ = 16), to stand beside measured ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.evaluation.results import PAPER_LAMBDA, Results


@dataclass(frozen=True)
class PublishedRow:
    """Degradations in % and the mean alignment error; for Keep-All see ``Published``."""

    intended: float
    unintended: float
    error: float

    @property
    def total(self) -> float:
        """The sum of both degradations."""
        return self.intended + self.unintended


@dataclass(frozen=True)
class Published:
    """One data set of the paper. Keep-All's Recall@50 and ROC-AUC are absolute, in %."""

    dataset: str
    recall: float
    auc: float
    rows: Mapping[str, PublishedRow]

    def row(self, name: str, lam: float | None) -> PublishedRow | None:
        """Return what the paper prints of a method; it prints no other λ than 16."""
        return self.rows.get(name) if lam in (None, PAPER_LAMBDA) else None


def published(results: Results) -> Published | None:
    """Return the paper's figures for this data set, told by its counts; None for any other."""
    return _BY_COUNTS.get((results.users, results.items, results.interactions))


def _published(
    dataset: str, keep_all: tuple[float, float], *rows: tuple[float, float, float]
) -> Published:
    named = zip(_METHODS, (PublishedRow(*row) for row in rows), strict=True)
    return Published(dataset, *keep_all, dict(named))


_METHODS = (
    "fix-m0",
    "finetune-m0",
    "non-bc",
    "post-lin-sloss",
    "post-lin-mloss",
    "joint-notrans",
    "joint-lin-sloss",
    "bc-aligner",
)

_BY_COUNTS = {
    (27_530, 10_611, 231_312): _published(
        "Musical Instruments",
        (12.13, 68.66),
        (-26.81, 0.0, 0.0),
        (-7.69, -7.46, 1.01),
        (0.0, -26.45, 2.61),
        (0.0, -10.25, 1.27),
        (0.0, -14.43, 1.34),
        (-9.00, -0.80, 0.41),
        (-3.67, -1.07, 0.48),
        (-2.96, -0.65, 0.38),
    ),
    (55_223, 17_389, 496_315): _published(
        "Video Games",
        (12.69, 72.76),
        (-25.55, 0.0, 0.0),
        (-10.61, -6.72, 0.87),
        (0.0, -30.81, 2.65),
        (0.0, -8.25, 1.10),
        (0.0, -14.56, 2.51),
        (-9.12, -0.62, 0.32),
        (-3.98, -1.03, 0.40),
        (-3.35, -0.59, 0.28),
    ),
    (127_496, 41_280, 1_143_063): _published(
        "Grocery",
        (7.78, 65.82),
        (-27.79, 0.0, 0.0),
        (-24.74, -5.52, 1.12),
        (0.0, -22.07, 2.69),
        (0.0, -6.36, 1.30),
        (0.0, -15.69, 4.84),
        (-11.31, -0.33, 0.18),
        (-2.90, -2.17, 0.52),
        (-3.21, -0.07, 0.13),
    ),
}
