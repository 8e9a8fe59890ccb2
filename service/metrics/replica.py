"""The metrics of a replica, whichever of its workers is asked."""

from collections.abc import Callable, Mapping
from threading import Lock

from service.metrics.exposition import Rendering, put_together, render
from service.metrics.families import Key
from service.metrics.meter import Meter
from service.metrics.sheets import Sheet, SheetFile

WRITE_SECONDS = 1.0
"""How often a worker writes its sheet; a kill loses at most what it counted in this time."""


class Metrics:
    """Shows what all workers have counted, and lets the others see what this one has.

    Args:
        gauges: reads how this worker stands.
        file: where this worker's sheet is written and the others' are found; None where there are
            no others.
        shed: how many requests this worker refused so far, by the limit.
    """

    def __init__(
        self,
        meter: Meter,
        gauges: Callable[[], Mapping[Key, float]],
        file: SheetFile | None,
        shed: Mapping[str, int],
    ) -> None:
        self._meter, self._gauges, self._file, self._shed = meter, gauges, file, shed
        self._writing = Lock()

    def write(self) -> Sheet:
        """Write this worker's sheet, and return it; raise OSError."""
        with self._writing:
            sheet = self._read()
            if self._file is not None:
                self._file.write(sheet)
        return sheet

    def text(self, rendering: Rendering) -> bytes:
        """Return the metrics of the whole replica."""
        try:
            own = self.write()
        except OSError:  # the log tells of it: the sheet is written every second anyway
            own = self._read()
        others = [] if self._file is None else self._file.others()
        return render(put_together([own, *others]), rendering)

    def _read(self) -> Sheet:
        self._meter.take_shed(self._shed)
        return Sheet(self._meter.counts(), self._gauges())
