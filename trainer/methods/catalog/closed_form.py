"""Closed-form maps, after independent or joint training (see ``backcast.closed_form``)."""

from trainer.methods.base import Method
from trainer.methods.maps import LeastSquares, Procrustes
from trainer.methods.models import Independent, Joint

METHODS = (
    Method(
        "post-closed-form",
        "Post-Closed-Form",
        62,
        "Independent models, then the least-squares linear map.",
        Independent(),
        LeastSquares(),
    ),
    Method(
        "post-affine",
        "Post-Affine",
        63,
        "Independent models, then the least-squares affine map.",
        Independent(),
        LeastSquares(bias=True),
    ),
    Method(
        "post-procrustes",
        "Post-Procrustes",
        64,
        "Independent models, then zero-padded orthogonal Procrustes.",
        Independent(),
        Procrustes(),
    ),
    Method(
        "post-direct",
        "Post-Direct",
        65,
        "Independent models, then an affine least-squares map to every older version.",
        Independent(),
        LeastSquares(bias=True, direct=True),
    ),
    Method(
        "bc-aligner-refit",
        "BC-Aligner, refit",
        91,
        "BC-Aligner, its map refitted by least squares once the model is fixed.",
        Joint("multi"),
        LeastSquares(),
    ),
    Method(
        "bc-aligner-affine",
        "BC-Aligner, affine refit",
        92,
        "BC-Aligner, its map refitted by affine least squares once the model is fixed.",
        Joint("multi"),
        LeastSquares(bias=True),
    ),
    Method(
        "joint-direct",
        "Joint, direct maps",
        93,
        "Joint training with the single-step loss, then affine maps to every older version.",
        Joint("single", "affine"),
        LeastSquares(bias=True, direct=True),
    ),
)
