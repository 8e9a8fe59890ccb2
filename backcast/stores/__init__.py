"""Vector stores: one port, several implementations."""

from pathlib import Path

from backcast.errors import ConfigError
from backcast.settings import Settings
from backcast.stores.base import Gathered, StoredSnapshot, VectorStore
from backcast.stores.embedded import EmbeddedStore

__all__ = ["EmbeddedStore", "Gathered", "StoredSnapshot", "VectorStore", "open_store"]


def open_store(settings: Settings) -> VectorStore:
    """Open the store that ``settings`` name; raise ConfigError for an unknown scheme."""
    url = settings.vector_store_url
    scheme, _, rest = url.partition(":")
    if scheme == "embedded" and rest:
        return EmbeddedStore(Path(rest))
    if scheme in {"redis", "rediss"}:
        from backcast.stores.redis import RedisStore

        return RedisStore(url)
    shown = f"{scheme}:…" if "@" in url else url  # what stands before an @ is a password
    raise ConfigError(f"BACKCAST_STORE_URL={shown!r}: the scheme is embedded, redis or rediss.")
