"""Draw the idea of Backcast: ``python docs/draw_idea.py docs/idea.svg``."""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MUTED = "#1f2933", "#7b8794"
STORED, MAP, CONSUMER = "#2f6fde", "#d97706", "#0f9d73"
WIDTHS = {0: 0.62, 1: 0.80, 2: 1.00}


def box(axes: Axes, x: float, y: float, w: float, text: str, color: str, *, solid: bool) -> None:
    """Draw a rounded box centred at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - 0.21),
            w,
            0.42,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=color if solid else "white",
            edgecolor=color,
            linewidth=1.6,
        )
    )
    axes.text(x, y, text, ha="center", va="center", color="white" if solid else color, fontsize=11)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Draw an arrow."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=color, linewidth=1.5)
    )


def keep_all(axes: Axes) -> None:
    """The costly way: every model and all of its vectors are kept for ever."""
    axes.set_title("Keep-all: every model, every vector, for ever", loc="left", color=INK)
    for row, k in enumerate((0, 1, 2)):
        y = 2.6 - row
        box(axes, 0.5, y, 0.62, f"$M_{k}$", INK, solid=False)
        box(axes, 1.85, y, 1.1 * WIDTHS[k] + 0.3, f"all $z_{k}$", STORED, solid=True)
        box(axes, 3.65, y, 1.35, f"consumers of {k}", CONSUMER, solid=False)
        arrow(axes, (0.85, y), (1.85 - 0.55 * WIDTHS[k] - 0.2, y), MUTED)
        arrow(axes, (1.85 + 0.55 * WIDTHS[k] + 0.2, y), (2.93, y), MUTED)


def keep_latest(axes: Axes) -> None:
    """The way of Backcast: the latest vectors, and one small map a version."""
    axes.set_title("Backcast: the latest vectors, one small map a version", loc="left", color=INK)
    box(axes, 0.5, 0.6, 0.62, "$M_2$", INK, solid=False)
    box(axes, 1.85, 0.6, 1.4, "all $z_2$", STORED, solid=True)
    arrow(axes, (0.85, 0.6), (1.12, 0.6), MUTED)
    for row, (k, text) in enumerate(((0, r"$B_1(B_2(z_2))$"), (1, r"$B_2(z_2)$"), (2, r"$z_2$"))):
        y = 2.6 - row
        box(axes, 4.15, y, 1.35, f"consumers of {k}", CONSUMER, solid=False)
        if k == 2:
            arrow(axes, (2.58, y), (3.43, y), MUTED)
        else:
            box(axes, 1.85, y, 1.5, text, MAP, solid=False)
            arrow(axes, (1.85, y - 0.76), (1.85, y - 0.25), MAP)
            arrow(axes, (2.65, y), (3.43, y), MUTED)
    for y, name in ((1.1, "$B_2$"), (2.1, "$B_1$")):
        axes.text(1.65, y, name, color=MAP, fontsize=11, ha="center", va="center")
        axes.text(2.0, y, "on request", color=MUTED, fontsize=9, ha="left", va="center")


def draw() -> Figure:
    """Return the picture."""
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), (keep_all, keep_latest), strict=True):
        panel(axes)
        axes.set_xlim(0.1, 4.95)
        axes.set_ylim(0.2, 3.0)
        axes.axis("off")
    return figure


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "backcast"  # so that drawing twice gives the same file
    target = Path(sys.argv[1])
    draw().savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=150)
