"""The frontier of a benchmark: intended against unintended degradation, every method at every λ."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, cos, hypot, pi, sin
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from trainer.evaluation.drawing import (
    FAINT,
    MUTED,
    PAPER,
    Look,
    NotDrawn,
    Picture,
    drawing,
    looks,
    spread_note,
)
from trainer.evaluation.results import Figure, Results, by_method, rows
from trainer.evaluation.table import lambda_text, number


@dataclass(frozen=True)
class Rect:
    """A rectangle on the canvas, in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def centred(cls, x: float, y: float, width: float, height: float) -> "Rect":
        """Return the rectangle around a point."""
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    def shared(self, other: "Rect") -> float:
        """Return the area of what both cover."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True)
class Mark:
    """A method at one λ: intended (x) and unintended (y) degradation in %."""

    lam: float | None
    x: Figure
    y: Figure

    @property
    def at(self) -> tuple[float, float]:
        """The point."""
        return self.x.mean, self.y.mean


@dataclass(frozen=True)
class Path:
    """A method through its λs, or its single mark."""

    title: str
    look: Look
    marks: Sequence[Mark]


_FEW = 5  # points that need no enlarging


def frontier(results: Results) -> Picture | NotDrawn:
    """Draw one line a method that was run at several λ, and one mark for any other."""
    title = "The frontier: intended against unintended"
    paths = _paths(results)
    if not paths:
        return NotDrawn(title, "no task was tested on ver-0 vectors")
    points = [mark.at for path in paths for mark in path.marks]
    whole, better = _box(points), _better_half(points)
    smaller = better.width < 0.6 * whole.width or better.height < 0.6 * whole.height
    zoomed = smaller and len(points) > _FEW
    with drawing(2 if zoomed else 1, height=4.7) as canvas:
        for axes, box in zip(canvas.axes, (whole, better), strict=False):
            _draw(axes, paths, box)
        if zoomed:
            canvas.axes[0].set_title("all")
            canvas.axes[1].set_title("the better half, enlarged")
            _outline(canvas.axes[0], better)
        canvas.legend("outside lower center", columns=4)
        canvas.settle()
        for axes in canvas.axes:
            room = Room(axes, paths)
            _draw_equal_sums(axes, room)
            _write_lambdas(axes, paths, room, better if axes is not canvas.axes[-1] else None)
        caption = (
            "Up and to the right is better; Keep-All is the corner where nothing is lost, points "
            "on one grey line have the same sum of both losses, and the numbers at the points are "
            f"their λ. {spread_note(results)}"
        )
        return canvas.picture("frontier", title, caption)


def _paths(results: Results) -> list[Path]:
    styles = looks(results)
    paths = []
    for name, group in by_method(rows(results)).items():
        marks = [
            Mark(row.lam, row.intended, row.unintended)
            for row in group
            if row.intended is not None and row.unintended is not None
        ]
        if marks:
            paths.append(Path(group[0].title, styles[name], marks))
    return paths


def _better_half(points: Sequence[tuple[float, float]]) -> Bbox:
    """Return what holds the half with the better sums, and whatever would lie on its edge."""
    chosen = sorted(points, key=sum, reverse=True)[: ceil(len(points) / 2)]
    box = _box(chosen)
    while len(within := [point for point in points if box.contains(*point)]) > len(chosen):
        chosen, box = within, _box(within)
    return box


def _box(points: Sequence[tuple[float, float]]) -> Bbox:
    """Return what holds the points and the corner where nothing is lost, with a margin."""
    x, y = zip(*points, (0.0, 0.0), strict=True)
    box = Bbox.from_extents(min(x), min(y), max(x), max(y))
    x_margin, y_margin = 0.08 * (box.width or 1.0), 0.08 * (box.height or 1.0)
    return Bbox.from_extents(
        box.x0 - x_margin, box.y0 - y_margin, box.x1 + x_margin, box.y1 + y_margin
    )


def _draw(axes: Axes, paths: Iterable[Path], box: Bbox) -> None:
    for path in paths:
        axes.errorbar(
            [mark.x.mean for mark in path.marks],
            [mark.y.mean for mark in path.marks],
            xerr=[mark.x.spread for mark in path.marks],
            yerr=[mark.y.spread for mark in path.marks],
            linestyle=path.look.dash if len(path.marks) > 1 else "none",
            label=path.title,
            **path.look.marks,
        )
    axes.set_xlim(box.x0, box.x1)
    axes.set_ylim(box.y0, box.y1)
    axes.set_xlabel("intended task: change of Recall@50, %")
    axes.set_ylabel("unintended tasks: change of ROC-AUC, %")
    axes.grid(visible=False)


def _outline(axes: Axes, box: Bbox) -> None:
    axes.add_patch(
        Rectangle(box.min, box.width, box.height, fill=False, edgecolor=MUTED, linewidth=0.8)
    )


def _draw_equal_sums(axes: Axes, room: "Room") -> None:
    """Draw x + y = s for round s, and write s at the end of the line that is freer."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for total in MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(left + bottom, right + top):
        if not left + bottom < total <= 0:
            continue
        axes.axline((total, 0), slope=-1, color=FAINT, linewidth=0.8, zorder=0)
        upper = (left, total - left) if total - left < top else (total - top, top)
        lower = (total - bottom, bottom) if total - bottom < right else (right, total - right)
        step = 0.04 * (right - left)
        ends = (upper[0] + step, upper[1] - step), (lower[0] - step, lower[1] + step)
        text = number(total, 0 if float(total).is_integer() else 1)
        room.write(text, [(end, (0.0, 0.0)) for end in ends], color=MUTED, zorder=1, bbox=_ON_PAPER)


_ON_PAPER = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}
_SIZE = 7.0
_REACHES = (9.0, 14.0, 19.0)  # points from a mark to the middle of its λ, the nearest first
_AROUND = [
    (reach * cos(at * pi / 8), reach * sin(at * pi / 8)) for reach in _REACHES for at in range(16)
]


def _write_lambdas(axes: Axes, paths: Sequence[Path], room: "Room", elsewhere: Bbox | None) -> None:
    """Write each λ beside its mark; those in ``elsewhere`` are left out."""
    for path in paths:
        for mark in path.marks:
            shown = axes.viewLim.contains(*mark.at)
            if mark.lam is None or not shown or (elsewhere and elsewhere.contains(*mark.at)):
                continue
            spots = [(mark.at, offset) for offset in _AROUND]
            room.write(lambda_text(mark.lam), spots, color=path.look.color, zorder=3)


Spot = tuple[tuple[float, float], tuple[float, float]]
"""A point of the axes, and how many points right and up of it the middle of a text comes."""


class Room:
    """What is free in the axes, for small texts to be written where they cover least."""

    def __init__(self, axes: Axes, paths: Iterable[Path]) -> None:
        self._axes = axes
        self._pixels = axes.figure.dpi / 72  # a point
        self._inside = Rect(*axes.bbox.extents)
        self._taken = [rect for path in paths for rect in self._covered_by(path)]

    def write(self, text: str, spots: Sequence[Spot], **style: Any) -> None:
        """Write ``text`` at the freest of ``spots``, rather near than far, and take that place."""
        best = min(spots, key=lambda spot: self._cost(self._rect(text, spot)) + hypot(*spot[1]))
        self._taken.append(self._rect(text, best))
        self._axes.annotate(
            text,
            best[0],
            xytext=best[1],
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=_SIZE,
            **style,
        )

    def _rect(self, text: str, spot: Spot) -> Rect:
        x, y = self._at(*spot[0])
        middle = x + spot[1][0] * self._pixels, y + spot[1][1] * self._pixels
        width, height = _SIZE * (0.4 + 0.64 * len(text)), 1.2 * _SIZE
        return Rect.centred(*middle, width * self._pixels, height * self._pixels)

    def _cost(self, rect: Rect) -> float:
        """Return the area of ``rect`` that covers something or sticks out."""
        covered = sum(rect.shared(other) for other in self._taken)
        return rect.shared(rect) - rect.shared(self._inside) + covered

    def _covered_by(self, path: Path) -> Iterator[Rect]:
        """Yield the marks of a path with their bars, and small squares along its line."""
        for mark in path.marks:
            x, y = self._at(*mark.at)
            yield Rect.centred(x, y, 6 * self._pixels, 6 * self._pixels)
            (x0, y0), (x1, y1) = (
                self._at(mark.x.mean + sign * mark.x.spread, mark.y.mean + sign * mark.y.spread)
                for sign in (-1, 1)
            )
            yield Rect(x0, y - 2 * self._pixels, x1, y + 2 * self._pixels)
            yield Rect(x - 2 * self._pixels, y0, x + 2 * self._pixels, y1)
        for (x0, y0), (x1, y1) in pairwise(self._at(*mark.at) for mark in path.marks):
            steps = ceil(hypot(x1 - x0, y1 - y0) / (3 * self._pixels))
            for share in (at / steps for at in range(1, steps)):
                x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
                yield Rect.centred(x, y, 2 * self._pixels, 2 * self._pixels)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point of the axes lies, in pixels."""
        across, up = self._axes.transData.transform((x, y)).tolist()
        return across, up
