"""Requests, what wrk answers, and figures made of it."""

import re
from pathlib import Path

import numpy as np
import orjson
import pytest

from benchmarks.serving_bench import at_least, at_most, middle, rates, ratio
from benchmarks.serving_data import ids_of, random_ids
from benchmarks.serving_load import (
    RAW,
    Load,
    Unmeasured,
    batches,
    find_wrk,
    pieces,
    read_load,
    singles,
)


def test_ids_look_like_product_numbers_and_none_comes_twice() -> None:
    ids = ids_of(np.arange(200_000))
    assert all(re.fullmatch(r"B0[0-9A-Z]{8}", id) for id in ids[:1000])
    assert len(set(ids)) == len(ids)
    assert ids_of(np.array([199_999])) == ids[-1:]
    assert set(random_ids(10, 500)) == set(ids[:10])


def test_only_whole_batches_are_sent() -> None:
    assert pieces("abcdefg", 3) == ["abc", "def"]
    sent = batches(["a", "b", "c", "d", "e"], 2, RAW)
    assert [orjson.loads(body) for _, body in sent.pairs] == [
        {"ids": ["a", "b"], "version": 0},
        {"ids": ["c", "d"], "version": 0},
    ]
    assert sent.vectors == 2
    assert [path for path, _ in sent.to("/elsewhere").pairs] == ["/elsewhere"] * 2


def test_a_script_holds_headers_and_where_its_requests_are(tmp_path: Path) -> None:
    script = singles(["A1", "B2"], RAW, "bc_secret").script(tmp_path).read_text()
    assert 'wrk.headers["Accept"] = "application/octet-stream"\n' in script
    assert 'wrk.headers["Authorization"] = "Bearer bc_secret"\n' in script
    lines = tmp_path / "requests.txt"
    assert f'io.lines("{lines}")' in script
    assert lines.read_text() == ("/embeddings/A1?version=0\t\n/embeddings/B2?version=0\t\n")


def result(**changes: int) -> str:
    found = {
        "requests": 100,
        "seconds": 2.0,
        "p50_ms": 1.5,
        "p99_ms": 3.0,
        "non_2xx": 0,
        "errors": 0,
        **changes,
    }
    return f"Running 2s test\n\nresult {orjson.dumps(found).decode()}\n"


def test_a_result_is_read() -> None:
    load = read_load(result(), vectors=10, cpu=0.5)
    assert (load.rate, load.vector_rate, load.p99_ms) == (50.0, 500.0, 3.0)
    assert load.wrk_us == 5000.0


@pytest.mark.parametrize("trouble", [{"non_2xx": 1}, {"errors": 1}, {"requests": 0}])
def test_a_load_with_wrong_answers_is_no_figure(trouble: dict[str, int]) -> None:
    with pytest.raises(Unmeasured, match="not every answer was right"):
        read_load(result(**trouble), 1, 0.0)


def test_a_load_without_a_result_is_no_figure() -> None:
    with pytest.raises(Unmeasured, match="unable to connect"):
        read_load("unable to connect", 1, 0.0)


def test_a_missing_wrk_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(Unmeasured, match="apt-get install wrk"):
        find_wrk(str(tmp_path))


def load(rate: float, vectors: int = 1, server_cpu: float = 0.0) -> Load:
    return Load(int(rate), 1.0, 1.0, 2.0, 0, 0, vectors, 0.1, server_cpu)


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    ours, theirs = [load(10), load(90), load(40)], [load(10), load(10), load(20)]
    assert ratio(ours, theirs) == 2.0
    assert middle(ours) == 40.0
    shown = rates([load(2, 1000, server_cpu=0.5)], [load(1, 1000, server_cpu=1)])
    assert shown == "2,000 / 1,000 vectors/s; 250,000 / 1,000,000 µs of CPU a request"


def test_a_bar_is_met_where_it_is_reached() -> None:
    rows = [at_least("a", value, 0.9, "x") for value in (0.89, 0.9)]
    rows += [at_most("b", value, 1.2, "x") for value in (1.2, 1.21)]
    assert [row.cells()[1:] for row in rows] == [
        ["0.89 (x)", "≥ 0.9", "NO"],
        ["0.90 (x)", "≥ 0.9", "yes"],
        ["1.20 (x)", "≤ 1.2", "yes"],
        ["1.21 (x)", "≤ 1.2", "NO"],
    ]
