"""The nine rows of the paper's table (Hu et al., KDD 2022, section 5.4)."""

from trainer.methods.base import Method
from trainer.methods.maps import GradientFitted, JointlyTrained, Truncated
from trainer.methods.models import FineTuned, Frozen, Independent, Joint

METHODS = (
    Method(
        "keep-all",
        "Keep-All",
        10,
        "Every model and all its vectors are kept: the upper bound, and the cost to be saved.",
        Independent(),
        None,
    ),
    Method(
        "fix-m0",
        "Fix-M0",
        20,
        "The first model is used for ever.",
        Frozen(),
        Truncated(),
        trains=False,
    ),
    Method(
        "finetune-m0",
        "Finetune-M0",
        30,
        "The first model is trained on with new data; its vectors are taken for the old ones.",
        FineTuned(),
        Truncated(),
    ),
    Method(
        "non-bc",
        "Non-BC",
        40,
        "Models are independent; the first coordinates of the new vectors pass for the old ones.",
        Independent(),
        Truncated(),
    ),
    Method(
        "post-lin-sloss",
        "Post-Lin-SLoss",
        50,
        "Independent models, then a linear map by gradient descent on the single-step loss.",
        Independent(),
        GradientFitted("single"),
    ),
    Method(
        "post-lin-mloss",
        "Post-Lin-MLoss",
        60,
        "Independent models, then a linear map by gradient descent on the multi-step loss.",
        Independent(),
        GradientFitted("multi"),
    ),
    Method(
        "joint-notrans",
        "Joint-NoTrans",
        70,
        "Joint training that makes the first coordinates of z_k the old vectors.",
        Joint("single", "truncation"),
        JointlyTrained(),
    ),
    Method(
        "joint-lin-sloss",
        "Joint-Lin-SLoss",
        80,
        "Joint training of model and linear map with the single-step loss.",
        Joint("single"),
        JointlyTrained(),
    ),
    Method(
        "bc-aligner",
        "BC-Aligner",
        90,
        "Joint training of model and linear map with the multi-step loss: the paper's method.",
        Joint("multi"),
        JointlyTrained(),
    ),
)
