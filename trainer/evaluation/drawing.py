"""What every figure is drawn with: one look a method, one style, PNG and SVG to the byte."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.typing import LegendLocType, RcKeyType

from trainer.evaluation.results import (
    BC_ALIGNER,
    KEEP_ALL,
    NO_TRANS,
    SINGLE_STEP,
    Figure,
    Results,
    is_variant,
)
from trainer.evaluation.table import seeds_of

INK, MUTED, FAINT, PAPER = "#1f2933", "#6b7785", "#c9d1d9", "#ffffff"
"""Colours of text, of what stands back, of grids, and of the ground."""

WIDTH = 8.4  # inches: across a page of A4, or of HTML


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its file name without suffix, and one sentence on how to read it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class NotDrawn:
    """A figure that there are no results for, and why."""

    title: str
    reason: str


@dataclass(frozen=True)
class Look:
    """How a method is drawn, in every figure alike; what is made from another one is hollow."""

    color: str
    marker: str
    dash: str = "-"
    hollow: bool = False

    @property
    def marks(self) -> dict[str, Any]:
        """What matplotlib is told of it."""
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": 8 if self.marker == "*" else 5,
            "markerfacecolor": PAPER if self.hollow else self.color,
            "elinewidth": 0.8,
        }


_LOOKS = {
    KEEP_ALL: Look(INK, "*"),
    BC_ALIGNER: Look("#2f6fde", "o"),
    SINGLE_STEP: Look("#d97706", "s"),
    NO_TRANS: Look("#0f9d73", "^"),
}
_COLORS = ("#b0489b", "#3fa7d6", "#c0392b", "#8a6d3b", "#7a6ff0", "#86a31f", "#5f7d8f")
_MARKERS = ("D", "v", "P", "X", "p", "<", "h", ">")
_DASHES = ("--", ":", "-.")


def looks(results: Results) -> dict[str, Look]:
    """Return one look a method.

    A variant has its base's colour and other dashes: bc-aligner-refit is a dashed bc-aligner.
    Methods that no figure is about take the other colours in their order.
    """
    names = list(dict.fromkeys(method.name for method in results.methods))
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_base(name, [*_LOOKS, *names]), []).append(name)
    found = dict(_LOOKS)
    for base, family in families.items():
        if base not in _LOOKS:
            found[base] = look_of(len(found))
        for at, name in enumerate(name for name in family if name != base):
            found[name] = _variant(found[base], at)
    return found


def _base(name: str, bases: Sequence[str]) -> str:
    return min((base for base in bases if is_variant(name, base)), key=len)


def _variant(look: Look, at: int) -> Look:
    marker = (look.marker, *_MARKERS)[at % (1 + len(_MARKERS))]
    return Look(look.color, marker, _DASHES[at % len(_DASHES)], hollow=True)


def look_of(position: int) -> Look:
    """Return a look for what has none of its own: the first few are those of the paper's methods.

    Position 0 is black.
    """
    named = list(_LOOKS.values())
    if position < len(named):
        return named[position]
    at = position - len(named)
    return Look(_COLORS[at % len(_COLORS)], _MARKERS[at % len(_MARKERS)])


class Drawing:
    """A row of axes, and the pictures made of it."""

    def __init__(self, columns: int, width: float, height: float) -> None:
        self._canvas = Canvas(figsize=(width, height), layout="constrained")
        self.axes: list[Axes] = list(self._canvas.subplots(1, columns, squeeze=False)[0])

    def legend(self, where: LegendLocType, columns: int = 1) -> None:
        """Put the legend of the first axes outside all of them."""
        handles, labels = self.axes[0].get_legend_handles_labels()
        self._canvas.legend(handles, labels, loc=where, ncols=columns)

    def settle(self) -> None:
        """Fix where the axes lie, so that what is placed by pixels stays there."""
        self._canvas.draw_without_rendering()
        self._canvas.set_layout_engine("none")

    def picture(self, name: str, title: str, caption: str) -> Picture:
        """Return the drawing as files."""
        return Picture(name, title, caption, self._save("png"), self._save("svg"))

    def _save(self, format: str) -> bytes:
        """Leave out dates and versions: the same drawing is the same bytes."""
        silent = {"png": ("Software",), "svg": ("Creator", "Date", "Format", "Type")}[format]
        file = io.BytesIO()
        metadata = dict.fromkeys(silent)
        self._canvas.savefig(file, format=format, dpi=200, metadata=metadata)
        return file.getvalue()


@contextmanager
def drawing(columns: int = 1, *, height: float, width: float = WIDTH) -> Iterator[Drawing]:
    """Draw in the house style, whatever the user's own settings of matplotlib are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield Drawing(columns, width, height)


_STYLE: dict[RcKeyType, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text: small files, and readers can search them
    "svg.hashsalt": "backcast",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


def line(
    axes: Axes, x: Sequence[float], figures: Sequence[Figure | None], look: Look, label: str
) -> None:
    """Draw a mean with its spread over ``x``; what is not known is left out."""
    known = [(at, figure) for at, figure in zip(x, figures, strict=True) if figure]
    axes.errorbar(
        [at for at, _ in known],
        [figure.mean for _, figure in known],
        yerr=[figure.spread for _, figure in known],
        linestyle=look.dash,
        capsize=2,
        label=label,
        **look.marks,
    )


def head(axes: Axes, title: str, unit: str) -> None:
    """Write what is drawn above the axes, and in which unit below that."""
    axes.set_title(f"{title}\n{unit}", linespacing=1.4)


def zero_line(axes: Axes) -> None:
    """Mark where nothing is lost, so that no axis exaggerates."""
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)


def time_axis(axes: Axes, results: Results) -> None:
    """Mark the moments t_k."""
    times = results.trained_at
    margin = 0.05 * (times[-1] - times[0] or 1.0)
    axes.set_xticks(times, [f"{t:g}" for t in times])
    axes.set_xlim(times[0] - margin, times[-1] + margin)
    axes.set_xlabel("t_k, share of interactions seen")


def beside(times: Sequence[float], position: int, of: int) -> list[float]:
    """Move the ``position``-th of ``of`` lines a little, so that their bars stand side by side."""
    step = 0.01 * (times[-1] - times[0])
    return [t + step * (position - (of - 1) / 2) for t in times]


def spread_note(results: Results) -> str:
    """Say what the bars are."""
    seeds = len(seeds_of(results))
    if seeds < 2:
        return "One training seed, so that no spread is known."
    return f"Bars are one standard deviation over {seeds} training seeds."
