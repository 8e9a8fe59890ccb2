"""The sheets of all workers put together, and written as Prometheus reads it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import accumulate
from operator import itemgetter
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from service.metrics.families import FAMILIES, Family, Key, Kind, Workers
from service.metrics.sheets import Sheet

Number = TypeVar("Number")

_OPENMETRICS, _VERSION = "application/openmetrics-text", "1.0.0"


class Rendering(StrEnum):
    """How metrics may be written, by the media type."""

    TEXT = CONTENT_TYPE_PLAIN_0_0_4
    OPENMETRICS = f"{_OPENMETRICS}; version={_VERSION}; charset=utf-8"


_ENCODERS: Mapping[Rendering, Callable[[Collector], bytes]] = {
    Rendering.TEXT: generate_latest,
    Rendering.OPENMETRICS: openmetrics.generate_latest,
}

_TOGETHER: Mapping[Workers, Callable[[list[float]], float]] = {
    Workers.SUM: sum,
    Workers.LEAST: min,
    Workers.MOST: max,
}


def put_together(sheets: Iterable[Sheet]) -> Sheet:
    """Return what the workers of a replica amount to."""
    counts: dict[Key, list[float]] = {}
    gauges: dict[Key, list[float]] = {}
    for sheet in sheets:
        for key, numbers in sheet.counts.items():
            known = counts.get(key, [0.0] * len(numbers))
            counts[key] = [a + b for a, b in zip(known, numbers, strict=True)]
        for key, number in sheet.gauges.items():
            gauges.setdefault(key, []).append(number)
    return Sheet(
        counts,
        {key: _TOGETHER[FAMILIES[key[0]].workers](numbers) for key, numbers in gauges.items()},
    )


def preferred(accept: str) -> Rendering:
    """Return OpenMetrics where an Accept header has it, of no or of this version; text otherwise.

    prometheus_client would promise any version that is asked for, and fails on what is none.
    """
    asked = any(_is_openmetrics(element) for element in accept.lower().split(","))
    return Rendering.OPENMETRICS if asked else Rendering.TEXT


def render(sheet: Sheet, rendering: Rendering) -> bytes:
    """Return a sheet as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Sheets(sheet))
    return _ENCODERS[rendering](registry)


def _is_openmetrics(element: str) -> bool:
    media, *parameters = element.split(";")
    pairs = (parameter.partition("=") for parameter in parameters)
    versions = {value.strip().strip('"') for name, _, value in pairs if name.strip() == "version"}
    return media.strip() == _OPENMETRICS and versions <= {_VERSION}


class _Sheets(Collector):
    def __init__(self, sheet: Sheet) -> None:
        self._sheet = sheet

    def collect(self) -> Iterator[Metric]:
        """Yield every family, also those without a series yet."""
        for family in FAMILIES.values():
            yield _METRICS[family.kind](family, self._sheet)


def _counter(family: Family, sheet: Sheet) -> Metric:
    metric = CounterMetricFamily(family.name, family.meaning, labels=family.labels)
    for values, numbers in _series(sheet.counts, family):
        metric.add_metric(values, numbers[0])
    return metric


def _histogram(family: Family, sheet: Sheet) -> Metric:
    metric = HistogramMetricFamily(family.name, family.meaning, labels=family.labels)
    bounds = [*map(repr, family.buckets), "+Inf"]
    for values, (*counted, total) in _series(sheet.counts, family):
        buckets = list(zip(bounds, accumulate(counted), strict=True))
        metric.add_metric(values, buckets, total)
    return metric


def _gauge(family: Family, sheet: Sheet) -> Metric:
    metric = GaugeMetricFamily(family.name, family.meaning, labels=family.labels)
    for values, number in _series(sheet.gauges, family):
        metric.add_metric(values, number)
    return metric


def _age(family: Family, sheet: Sheet) -> Metric:
    now = time.time()
    ages = {key: max(0.0, now - since) for key, since in sheet.gauges.items()}
    return _gauge(family, Sheet(gauges=ages))


def _series(
    numbers: Mapping[Key, Number], family: Family
) -> Iterator[tuple[tuple[str, ...], Number]]:
    for (name, values), number in sorted(numbers.items(), key=itemgetter(0)):
        if name == family.name:
            yield values, number


_METRICS: Mapping[Kind, Callable[[Family, Sheet], Metric]] = {
    Kind.COUNTER: _counter,
    Kind.HISTOGRAM: _histogram,
    Kind.GAUGE: _gauge,
    Kind.AGE: _age,
}
