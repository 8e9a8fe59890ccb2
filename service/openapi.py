"""Print the OpenAPI document: ``python -m service.openapi > docs/openapi.json``."""

import sys

import orjson

from backcast.settings import Settings
from service.app import create_app


def render() -> bytes:
    """Return the OpenAPI document as indented JSON."""
    document = create_app(Settings()).openapi()
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


if __name__ == "__main__":
    sys.stdout.buffer.write(render())
