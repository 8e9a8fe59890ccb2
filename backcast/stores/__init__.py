"""Vector stores: one port, several implementations."""

from pathlib import Path
from urllib.parse import urlsplit

from backcast.errors import ConfigError
from backcast.settings import Settings
from backcast.stores.base import Gathered, StoredSnapshot, VectorStore
from backcast.stores.embedded import EmbeddedStore
from backcast.stores.precision import Precision, Rounder, Rounding
from backcast.stores.traced import TracedStore
from backcast.tracing import NO_TRACES, Tracing

__all__ = [
    "EmbeddedStore",
    "Gathered",
    "Precision",
    "Rounder",
    "Rounding",
    "StoredSnapshot",
    "TracedStore",
    "VectorStore",
    "is_embedded",
    "open_store",
    "shown_url",
]


def open_store(settings: Settings, tracing: Tracing = NO_TRACES) -> VectorStore:
    """Open the store that ``settings`` name; raise ConfigError for an unknown scheme."""
    store = _open(settings)
    if not tracing.wanted:
        return store
    return TracedStore(store, tracing, settings.vector_store_url.partition(":")[0])


def _open(settings: Settings) -> VectorStore:
    url, precision = settings.vector_store_url, Precision(settings.store_precision)
    scheme, _, rest = url.partition(":")
    if scheme == "embedded" and rest:
        return EmbeddedStore(Path(rest), precision)
    if scheme in {"redis", "rediss"}:
        from backcast.stores.redis import RedisStore

        return RedisStore(url, precision)
    raise ConfigError(
        f"BACKCAST_STORE_URL={shown_url(url)!r}: the scheme is embedded, redis or rediss."
    )


def is_embedded(store: VectorStore) -> bool:
    """Return whether vectors are read from this host's memory, traced or not."""
    return isinstance(store.store if isinstance(store, TracedStore) else store, EmbeddedStore)


def shown_url(url: str) -> str:
    """Return a store's URL for a log or a message, without all that may be a password."""
    if "@" not in url and "?" not in url:
        return url
    try:
        parts = urlsplit(url)
        where = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    except ValueError:  # a password with characters that should have been encoded
        return f"{url.partition(':')[0]}:…"
    hidden = "@" in parts.path + parts.query + parts.fragment
    return f"{parts.scheme}:…" if hidden else f"{parts.scheme}://{where}{parts.path}"
