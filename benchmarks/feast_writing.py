"""Write vectors to Feast's Redis online store: ``feast_writing.py FOLDER REDIS_URL``.

Run by ``benchmarks/feast_comparison.py`` with Feast's own Python. The folder holds ``ids.txt`` and
``vectors.npy``, (n, D) float32, and becomes the feature repository.
"""

import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from feast import (  # type: ignore[import-not-found]
    Entity,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
)
from feast.types import Array, Float32, String  # type: ignore[import-not-found]

ROWS = 2_000
CONFIG = """\
project: benchmark
provider: local
registry: registry.db
online_store: {{type: redis, connection_string: "{address}"}}
offline_store: {{type: file}}
entity_key_serialization_version: 3
"""


def main() -> None:
    """Define one feature of one entity, and write it for every id."""
    folder, address = Path(sys.argv[1]), sys.argv[2].removeprefix("redis://").partition("/")[0]
    (folder / "feature_store.yaml").write_text(CONFIG.format(address=address))
    ids = (folder / "ids.txt").read_text().split()
    vectors = np.load(folder / "vectors.npy")
    now = datetime.now(timezone.utc)  # noqa: UP017 Feast's Python may be an older one

    store = FeatureStore(repo_path=str(folder))
    item = Entity(name="item", join_keys=["item_id"])
    columns = ["item_id", "embedding", "event_timestamp"]
    source = folder / "source.parquet"
    pd.DataFrame([[ids[0], vectors[0], now]], columns=columns).to_parquet(source)
    view = FeatureView(
        name="vectors",
        entities=[item],
        ttl=timedelta(days=1),
        schema=[Field(name="item_id", dtype=String), Field(name="embedding", dtype=Array(Float32))],
        source=FileSource(path=str(source), timestamp_field="event_timestamp"),
    )
    store.apply([item, view])
    for start in range(0, len(ids), ROWS):
        piece = slice(start, start + ROWS)
        rows = pd.DataFrame({"item_id": ids[piece], "embedding": list(vectors[piece])})
        store.write_to_online_store("vectors", rows.assign(event_timestamp=now))


if __name__ == "__main__":
    main()
