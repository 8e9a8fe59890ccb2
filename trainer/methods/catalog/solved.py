"""Joint training with a map that is solved, not trained: the project's own methods."""

from trainer.methods.base import Method
from trainer.methods.maps import LeastSquares
from trainer.methods.models import JointSolved

METHODS = (
    Method(
        "solved",
        "Solved",
        100,
        "Joint training that keeps the parent's vectors an affine function of the new ones.",
        JointSolved(),
        LeastSquares(bias=True, balanced=True),
    ),
    Method(
        "solved-direct",
        "Solved, direct maps",
        101,
        "The same models, with a map to every older version whose model is archived.",
        JointSolved(),
        LeastSquares(bias=True, direct=True, balanced=True),
    ),
    Method(
        "grown",
        "Grown",
        102,
        "As Solved, but M_k begins near its parent, to which new units and layers are added.",
        JointSolved(grown=True),
        LeastSquares(bias=True, balanced=True),
    ),
    Method(
        "grown-direct",
        "Grown, direct maps",
        103,
        "As Grown, but every older version whose model is archived is kept and mapped to.",
        JointSolved(all_versions=True, grown=True),
        LeastSquares(bias=True, direct=True, balanced=True),
    ),
)
