"""What the importers share: how a file is opened, and how a refusal quotes it."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backcast.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
"""A gzip file is known by its first two bytes, whatever its name."""

_QUOTED = 40


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading and unpacking ``path`` can raise into a DataError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. Check the path.") from error
    except EOFError as error:
        raise DataError(
            f"{path} ends too soon: the gzip file is cut off. Copy it again."
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}. Copy it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def shortened(value: object) -> str:
    """Return ``value`` as Python would write it, or the beginning of that."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _QUOTED else f"{value[:_QUOTED]!r}…"
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"
