"""Write the Grafana dashboard: ``python -m deploy.dashboard > deploy/grafana/backcast.json``.

Panels are declared here; where they stand, their numbers and Grafana's own words follow.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import orjson

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_ALL = 'job=~"$job", instance=~"$instance"'
_ONE, _BATCH = "/embeddings/{id}", "/embeddings/batch"
_FAILED, _TAILS = 'status=~"5.."', 'quantile=~"0.95|1"'
_WIDTH = 24  # of Grafana's grid


@dataclass(frozen=True)
class Query:
    """PromQL, and how its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel; ``width`` of 24, ``unit`` and ``kind`` in Grafana's words."""

    title: str
    meaning: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A heading, and the panels below it."""

    title: str
    panels: Sequence[Panel]


def _metric(name: str, *matchers: str) -> str:
    return f"{name}{{{', '.join((_ALL, *matchers))}}}"


def _rate(name: str, *matchers: str) -> str:
    return f"rate({_metric(name, *matchers)}[$__rate_interval])"


def _sum(labels: str, rate: str) -> str:
    return f"sum by ({labels}) ({rate})"


def _quantiles(route: str) -> list[Query]:
    buckets = _sum("le", _rate("backcast_request_seconds_bucket", f'route="{route}"'))
    return [
        Query(f"histogram_quantile({quantile}, {buckets})", f"p{100 * quantile:g}")
        for quantile in (0.5, 0.95, 0.99)
    ]


def _mean(name: str, labels: str, *matchers: str) -> str:
    spent = _sum(labels, _rate(f"{name}_sum", *matchers))
    return f"{spent} / {_sum(labels, _rate(f'{name}_count', *matchers))}"


_REQUESTS = f"sum({_rate('backcast_requests_total')})"
_ERRORS = (
    # Before the first error there is no series of one.
    f"(sum({_rate('backcast_requests_total', _FAILED)}) or vector(0)) / {_REQUESTS}"
)


def _stat(title: str, meaning: str, query: Query, unit: str = "short") -> Panel:
    """Return a panel that shows one number, the last."""
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto"}
    return Panel(title, meaning, [query], unit, "stat", 4, options)


ROWS = [
    Row(
        "Now",
        [
            _stat(
                "Replicas that serve",
                "Replicas whose every worker has loaded what is live.",
                Query(f"sum({_metric('backcast_serving')})", "serving"),
            ),
            _stat(
                "Workers",
                "Worker processes that live, of all replicas.",
                Query(f"sum({_metric('backcast_workers')})", "workers"),
            ),
            _stat(
                "Live version",
                "The lowest that a replica serves as live.",
                Query(f"min({_metric('backcast_live_version')})", "version"),
            ),
            _stat(
                "Age of the snapshot",
                "Since the live vectors were published.",
                Query(f"max({_metric('backcast_snapshot_age_seconds')})", "age"),
                "s",
            ),
            _stat(
                "Requests",
                "Of every kind, answered or refused.",
                Query(_REQUESTS, "requests"),
                "reqps",
            ),
            _stat(
                "Errors",
                "The part of requests that ended with 500 or more.",
                Query(_ERRORS, "errors"),
                "percentunit",
            ),
        ],
    ),
    Row(
        "Traffic",
        [
            Panel(
                "Requests by route and status",
                "Templates of paths, never an id.",
                [
                    Query(
                        _sum("route, method, status", _rate("backcast_requests_total")),
                        "{{method}} {{route}} {{status}}",
                    )
                ],
                unit="reqps",
            ),
            Panel(
                "Requests by version and format",
                "Answers with vectors, or that the client's copy is current.",
                [
                    Query(
                        _sum(
                            "version, format",
                            _rate("backcast_requests_total", 'version!="none"'),
                        ),
                        "version {{version}}, {{format}}",
                    )
                ],
                unit="reqps",
            ),
            Panel(
                "Requests in progress",
                "The scrape itself is one; what is answered at once is never seen here.",
                [Query(_sum("instance", _metric("backcast_requests_in_progress")), "{{instance}}")],
            ),
            Panel(
                "Vectors by version",
                "Vectors in answers.",
                [Query(_sum("version", _rate("backcast_vectors_total")), "version {{version}}")],
                unit="cps",
            ),
            Panel(
                "Bytes by version and format",
                "Bodies of answers with vectors.",
                [
                    Query(
                        _sum("version, format", _rate("backcast_response_bytes_total")),
                        "version {{version}}, {{format}}",
                    )
                ],
                unit="Bps",
            ),
            Panel(
                "Refusals by code",
                "Problem documents; docs/http.md says what each code means.",
                [Query(_sum("code", _rate("backcast_problems_total")), "{{code}}")],
                unit="reqps",
            ),
            Panel(
                "Too much to do",
                "What was refused by a limit; docs/limits.md says what each is.",
                [Query(_sum("limit", _rate("backcast_shed_total")), "{{limit}}")],
                unit="reqps",
            ),
        ],
    ),
    Row(
        "Latency",
        [
            Panel(
                "One vector",
                "From the head of the request to the last byte, within the service.",
                _quantiles(_ONE),
                unit="s",
            ),
            Panel(
                "Batches", "The same, of batches of whatever size.", _quantiles(_BATCH), unit="s"
            ),
            Panel(
                "Mean by version and format",
                "Of one vector and batches together.",
                [
                    Query(
                        _mean("backcast_request_seconds", "version, format", 'version!="none"'),
                        "version {{version}}, {{format}}",
                    )
                ],
                unit="s",
            ),
            Panel(
                "Where one vector's time goes",
                "Means: gather is lookup and reading, product maps back, encode writes.",
                [Query(_mean("backcast_stage_seconds", "stage", f'route="{_ONE}"'), "{{stage}}")],
                unit="s",
            ),
            Panel(
                "Where a batch's time goes",
                "The same. A batch that waits for another's product counts it as product.",
                [Query(_mean("backcast_stage_seconds", "stage", f'route="{_BATCH}"'), "{{stage}}")],
                unit="s",
            ),
            Panel(
                "How long requests took",
                "Requests by the time they took.",
                [
                    Query(
                        _sum("le", _rate("backcast_request_seconds_bucket", 'version!="none"')),
                        "{{le}}",
                    )
                ],
                unit="s",
                kind="heatmap",
            ),
        ],
    ),
    Row(
        "Versions",
        [
            Panel(
                "Deployment served",
                "Replicas differ for a moment while they follow a promotion or a rollback.",
                [
                    Query(_metric("backcast_live_generation"), "{{instance}}"),
                ],
            ),
            Panel(
                "Live version and snapshot",
                "One line for each snapshot that a replica serves.",
                [
                    Query(
                        "max by (instance, version, snapshot) "
                        f"({_metric('backcast_snapshot_info')})",
                        "{{instance}}: version {{version}}, {{snapshot}}",
                    )
                ],
            ),
            Panel(
                "Changes of ids on the snapshot",
                "The d of S.d.",
                [Query(_metric("backcast_live_delta"), "{{instance}}")],
            ),
            Panel(
                "Drift bound by version",
                "What 95 % and 100 % of the live vectors are within.",
                [
                    Query(
                        "max by (version, entity, quantile) "
                        f"({_metric('backcast_drift_bound', _TAILS)})",
                        "version {{version}}, {{entity}}, {{quantile}}",
                    )
                ],
            ),
            Panel(
                "Vectors without a drift bound",
                "New ids, and those whose past is not known.",
                [
                    Query(
                        f"max by (version, entity) ({_metric('backcast_drift_unknown_vectors')})",
                        "version {{version}}, {{entity}}",
                    )
                ],
            ),
            Panel(
                "Operations",
                "Under way anywhere; and ended here, in the last hour.",
                [
                    Query(
                        f"max by (kind) ({_metric('backcast_operation_running')})",
                        "{{kind}} under way",
                    ),
                    Query(
                        _sum(
                            "kind, outcome",
                            f"increase({_metric('backcast_operations_total')}[1h])",
                        ),
                        "{{kind}} {{outcome}}",
                    ),
                ],
            ),
        ],
    ),
    Row(
        "Trouble",
        [
            Panel(
                "Store and registry errors",
                "That ended a request or a task in the background.",
                [
                    Query(_sum("code", _rate("backcast_store_errors_total")), "{{code}}"),
                    Query(_sum("code", _rate("backcast_registry_errors_total")), "{{code}}"),
                ],
                unit="cps",
            ),
            Panel(
                "Since the registry was read",
                "It is read every BACKCAST_POLL_SECONDS.",
                [Query(_metric("backcast_registry_age_seconds"), "{{instance}}")],
                unit="s",
            ),
            Panel(
                "Failures in the background",
                "By what was to be done.",
                [
                    Query(
                        _sum("task", _rate("backcast_background_failures_total")),
                        "{{task}}",
                    )
                ],
                unit="cps",
            ),
            Panel(
                "Workers started",
                "In the last hour; one that dies is replaced.",
                [
                    Query(
                        _sum(
                            "instance",
                            f"increase({_metric('backcast_worker_starts_total')}[1h])",
                        ),
                        "{{instance}}",
                    )
                ],
            ),
            Panel(
                "Releases",
                "Replicas by the release that they run.",
                [
                    Query(f"count by (release) ({_metric('backcast_build_info')})", "{{release}}"),
                ],
            ),
        ],
    ),
]


def render() -> bytes:
    """Return the dashboard as Grafana imports it, as indented JSON."""
    document = {
        "uid": "backcast",
        "title": "Backcast",
        "tags": ["backcast"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_datasource(), _variable("job"), _variable("instance")]},
        "panels": list(_placed(ROWS)),
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    numbers, y = count(1), 0
    for row in rows:
        place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        heading = {"type": "row", "title": row.title, "collapsed": False, "panels": []}
        yield {"id": next(numbers), "gridPos": place, **heading}
        x, y, height = 0, y + 1, 4 if row.panels[0].kind == "stat" else 8
        for panel in row.panels:
            if x + panel.width > _WIDTH:
                x, y = 0, y + height
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            yield {"id": next(numbers), "gridPos": place, **_panel(panel)}
            x += panel.width
        y += height


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": dict(panel.options),
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }


def _variable(label: str) -> dict[str, Any]:
    chosen = "" if label == "job" else '{job=~"$job"}'
    return {
        "name": label,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": f"label_values(backcast_build_info{chosen}, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    sys.stdout.buffer.write(render())
