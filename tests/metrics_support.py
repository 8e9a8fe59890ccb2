"""Metrics, read as Prometheus reads them."""

from collections.abc import Mapping

import httpx2
from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    """Return every sample by its name and its labels; none may come twice."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, key
            samples[key] = sample.value
    return samples


def scrape(url: str) -> Samples:
    """Scrape a service by a connection of its own."""
    response = httpx2.get(f"{url}/metrics", timeout=30)
    assert response.status_code == 200, response.text
    return samples_of(response.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of the samples of this name that have these labels, whatever their others."""
    wanted = labels.items()
    return sum(
        number for (found, has), number in samples.items() if found == name and wanted <= has
    )


def labels_of(samples: Samples, name: str, label: str) -> set[str]:
    """Return the values that one label takes."""
    return {dict(has)[label] for found, has in samples if found == name}
